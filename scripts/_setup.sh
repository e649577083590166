# Sourced by the other scripts: a virtual environment with lora in it, made once and again when its inputs change.
#
#   setup_venv FOLDER NAME...      an editable install with these dependency groups, or extras as '.[bench]'; afterwards
#                                  $python is set
#   choose_torch                   sets $which, uv's options for the torch of this machine; after setup_venv
#
# Which torch: with an NVIDIA GPU the registry's default; else a CPU build, where pip's find-links folder holds one
# (constraints-cpu.txt); else uv's own choice for this machine.

unset PYTHONDONTWRITEBYTECODE # or every process would compile torch and transformers again, for six seconds

setup_venv() {
    local venv=$1
    shift
    python="$venv/bin/python"
    local stamp
    stamp=$(cat pyproject.toml constraints-cpu.txt scripts/_setup.sh | cksum)-$*
    if [ -x "$python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "python3 is $(python3 --version 2>&1); Python 3.11 or newer is needed." >&2
        exit 3
    fi
    echo "Setting up $venv ..." >&2
    [ -x "$python" ] || python3 -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check uv

    choose_torch
    local name target=. groups=()
    for name in "$@"; do
        case $name in
            .\[*) target=$name ;;
            *) groups+=(--group "$name") ;;
        esac
    done
    "$venv/bin/uv" pip install --quiet --python "$python" ${which[@]+"${which[@]}"} \
        --editable "$target" ${groups[@]+"${groups[@]}"}
    echo "$stamp" >"$venv/.stamp"
}

choose_torch() {
    local links
    which=()
    links=$("$python" -m pip config get global.find-links 2>/dev/null || true)
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        echo "torch: the default build, for the GPU that is here" >&2
    elif [ -n "$links" ] && ls $links/torch-*+cpu*.whl >/dev/null 2>&1; then
        echo "torch: the CPU build that pip's find-links folder holds" >&2
        export UV_FIND_LINKS=$links
        which=(--constraints constraints-cpu.txt)
    elif [ "$(uname -s)" = Linux ]; then
        echo "torch: the CPU build" >&2
        which=(--torch-backend cpu)
    fi
}
