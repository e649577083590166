"""Chat templates and configs that ask for more than there is: of time, of memory, of text."""

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat below the limit": "{{ 'a' * 10**8 }}",
    "power": "{{ 7 ** (10 ** 9) % 3 }}",
    "division": "{{ 3 ** (10**7) // 7 ** (3 * 10**6) % 3 }}",
    "translation": "{{ ('é' * 3 * 10**8).translate({}) | length }}",  # one operation in C that looks at no signal
    "loops": LOOPS,
    "loops of a list": "{% set x = namespace(l=[1]) %}{% for i in range(64) %}{% set x.l = x.l + x.l %}{% endfor %}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "sorting": "{{ (range(99999) | list * 900) | sort(reverse=true) | length }}",
    "lorem": "{{ lipsum(n=10**9) }}",
    "replace": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "tags": "{{ ('<a' * 10**7) | striptags | length }}",
    "one row": "{% if 'number 7' in messages[0].content %}" + LOOPS + "{% endif %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "files": "{% include '/etc/passwd' %}",
}

CONFIGS = {
    "aliases": "a0: &a0 [x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: {{<<: [{', '.join(['*a0'] * 99)}]}}\n" for n in range(1, 300)),
    "depth": "a: " + "[" * 400_000,
    "nodes": "a: [" + "1," * 400_000 + "]\n",
    "keys": "".join(f"k{n}: 1\n" for n in range(80_000)),
    "digits": "seed: " + "9" * 500_000 + "\n",
    "size": "#" * 2_000_000,
    "object": "model: !!python/object/apply:os.system ['touch CANARY']\n",
    "shorthand": "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.system ['touch CANARY']\n",
    "target": "model: {_target_: os.system, command: 'touch CANARY'}\ndata: {train: x}\noutput_dir: y\n",
}
