"""Generate the quickstart data set: a customer-support message in, a fixed one-line JSON record out.

Run: python scripts/make_quickstart_data.py            write configs/quickstart/{train,heldout}.jsonl
     python scripts/make_quickstart_data.py --check    exit 1 if the files on disk differ from the generator
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "quickstart"
SEED = 20
TRAIN_ROWS, HELDOUT_ROWS = 700, 60
MIN_WORDS, MAX_WORDS = 12, 34
SYSTEM = "Turn the support message into JSON: type, product, order, urgent."
Row = dict[str, list[dict[str, str]]]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ORDER_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

# The order of a message's parts; a message without one of them skips it.
LAYOUTS = (
    "opening problem order urgency closing",
    "opening order problem urgency closing",
    "opening problem urgency order closing",
    "opening urgency problem order closing",
    "opening problem order urgency",
    "opening order urgency problem",
    "problem order urgency closing",
    "problem urgency order closing",
    "order problem urgency closing",
    "urgency problem order closing",
)


@dataclass(frozen=True)
class Pool:
    """The phrasings one file is built from: {p} is the product, {o} the order number, {d} a weekday."""

    products: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    openings: tuple[str, ...]
    orders: tuple[str, ...]
    no_orders: tuple[str, ...]
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    closings: tuple[str, ...]
    calm_share: float  # of the messages that are not urgent, those that say so
    no_order_every: int  # one message in so many has no order number


# fmt: off
TRAIN = Pool(
    products=(
        "kettle", "toaster", "desk lamp", "office chair", "coffee grinder", "backpack", "rain jacket",
        "phone case", "keyboard", "wireless mouse", "monitor", "printer", "yoga mat", "bike helmet", "tent",
        "sleeping bag", "blender", "frying pan", "knife set", "wall clock", "bookshelf", "mattress", "pillow",
        "floor rug", "mirror", "vacuum cleaner", "iron", "hair dryer", "electric toothbrush", "water bottle",
        "suitcase", "umbrella", "garden hose", "lawn mower", "drill", "tool box", "guitar", "board game",
        "speaker", "tablet",
        "pressure cooker", "waffle iron", "bread maker", "juicer", "kitchen scale", "cutting board", "wine rack",
        "dinner plate", "coffee table", "floor lamp", "wardrobe", "bed frame", "curtain", "duvet", "bath towel",
        "shower head", "laundry basket", "ironing board", "window fan", "air purifier", "humidifier", "smoke alarm",
        "door lock", "paint roller", "electric saw", "step ladder", "wheelbarrow", "hedge trimmer", "barbecue",
        "parasol", "deck chair", "football", "tennis racket", "skateboard", "roller skates", "dumbbell",
        "rowing machine",
        "climbing rope", "fishing rod", "swim goggles", "winter coat", "running shoe", "leather belt", "wool scarf",
        "wrist watch", "sunglasses", "handbag", "jewellery box", "digital piano", "violin", "drum kit", "headphones",
        "turntable", "record player", "router", "webcam", "hard drive", "power bank", "charging cable", "smart watch",
        "game console", "projector", "e-book reader", "calculator", "paper shredder", "fountain pen", "notebook",
        "puzzle", "doll house", "toy train", "baby monitor", "high chair", "car seat", "cat tree", "dog bed",
        "aquarium",
        "bird feeder", "flower pot", "candle holder", "vase",
    ),
    problems={
        "late": (
            "The {p} was due on {d} and still has not arrived.",
            "I have been waiting two weeks for my {p} now.",
            "My {p} should have been here last {d}, but nothing has come.",
            "The delivery of the {p} is a week behind schedule.",
            "There is no sign of the {p} I bought, and the promised date has passed.",
            "The tracking page for the {p} has not moved for nine days.",
            "The {p} is late, and nobody can tell me where the parcel is.",
            "I paid for fast shipping, yet the {p} has still not turned up.",
            "You promised the {p} within three days and it has been ten.",
            "The courier keeps postponing the delivery of my {p}.",
            "I am still waiting for the {p} that you sent out at the start of the month.",
            "According to your site the {p} shipped long ago, but it never reached me.",
            "My {p} seems to be lost in the post, as it is many days overdue.",
            "The parcel with the {p} is delayed once again.",
            "Where is my {p}? It was meant to be delivered on {d}.",
            "The {p} has been stuck in your depot since {d}.",
        ),
        "damaged": (
            "The {p} arrived broken.",
            "When I opened the box, the {p} had a long crack down one side.",
            "My {p} came with a smashed corner and a big dent.",
            "The {p} was delivered yesterday with scratches all over it.",
            "One part of the {p} had snapped off inside the parcel.",
            "The box was crushed and the {p} inside is damaged.",
            "My new {p} is dented and wobbles.",
            "The {p} reached me in pieces.",
            "The {p} must have been dropped on the way, because it is badly bent.",
            "I unpacked the {p} and found it cracked right through the middle.",
            "There is a hole in the {p} that you sent me.",
            "The packaging was torn and the {p} got wet and stained.",
            "The {p} you delivered is chipped along the edge.",
            "Sadly the {p} did not survive the journey and is broken in two.",
            "The surface of the {p} is badly scratched, straight out of the box.",
            "My {p} came out of the parcel with a shattered front.",
        ),
        "wrong_item": (
            "I ordered the {p}, but something else was in the box.",
            "You sent me a different article instead of the {p}.",
            "This is not the {p} I picked, it is another model altogether.",
            "The parcel did not contain my {p} but an item I never asked for.",
            "Instead of the {p} I was sent somebody else's purchase.",
            "You shipped the wrong colour of the {p}.",
            "The {p} I got is the wrong size.",
            "I received the wrong item, what I ordered was the {p}.",
            "There has been a mix-up: I wanted the {p} and got another product.",
            "The {p} I was sent is not the version I chose on your site.",
            "I chose the {p} in blue and a green one came.",
            "Your warehouse packed the wrong thing, I was expecting the {p}.",
            "My invoice says {p}, but the box holds a completely different thing.",
            "The {p} in the parcel is a different model from the one on my invoice.",
            "I asked for the {p} in large and you delivered a small one.",
            "Someone swapped my {p} for another article before it was sent.",
        ),
        "refund": (
            "I sent the {p} back and would like my money back.",
            "I am still owed a refund for the {p} I returned.",
            "Please refund the full price of the {p}.",
            "I returned the {p} ten days ago and the money is not in my account.",
            "I do not want to keep the {p} and want my payment returned.",
            "You charged me twice for the {p}, please pay one of them back.",
            "The {p} is not for me, so I would like to return it and be reimbursed.",
            "When will I get the money for the {p} that I sent back?",
            "You confirmed my return of the {p}, but no refund has been paid.",
            "I want to be reimbursed for the {p}, which is already on its way back to you.",
            "Could you transfer the amount for the returned {p} to my card?",
            "I have handed in the {p} at your shop and am waiting for the refund.",
            "The {p} went back last {d} and I have not seen my money yet.",
            "I would like a full refund for the {p}.",
            "Please put the price of the {p} back on my credit card, I have returned it.",
            "You received my return of the {p}, so please credit my account.",
        ),
        "cancel": (
            "I want to cancel the {p}.",
            "Please stop the order for the {p}, I no longer need it.",
            "Please do not ship the {p}, I have changed my mind.",
            "I clicked too fast and would like to withdraw my order for the {p}.",
            "Can you still cancel the {p} I ordered yesterday?",
            "I have found another shop for the {p}, so please call off my order.",
            "We have decided against the {p}, kindly cancel the purchase.",
            "My order for the {p} was a mistake, please take it out of the system.",
            "Is it still possible to cancel the {p} that I ordered last {d}?",
            "I would like to call off the purchase of the {p}.",
            "Please remove the {p} from my order, I do not want it sent any more.",
            "I ordered the {p} twice by accident, please cancel the second one.",
            "Please annul my order of the {p}, it has not been sent yet.",
            "The {p} is no longer needed, so do not send it.",
            "I was given the {p} as a present, so please cancel mine.",
            "Please drop the {p} from my basket of last {d} and do not ship it.",
        ),
        "warranty": (
            "Is the {p} still under warranty?",
            "My {p} is a year old, does the guarantee still cover it?",
            "How long is the warranty on the {p}?",
            "The {p} stopped working after eight months and I would like to use the guarantee.",
            "I have a question about the warranty for my {p}.",
            "Does the guarantee for the {p} include repairs?",
            "What do I have to do to make a warranty claim for the {p}?",
            "Can you tell me when the guarantee for my {p} runs out?",
            "After a year and a half my {p} has given up, is that covered by the warranty?",
            "I never got a warranty card with my {p}.",
            "Would opening the {p} myself end the guarantee?",
            "I would like to extend the warranty of my {p}.",
            "Do I need the receipt for the guarantee of the {p}?",
            "Which parts of the {p} are covered by your two-year warranty?",
            "Is wear and tear on the {p} covered under the guarantee?",
            "I want to register my {p} for the warranty.",
        ),
    },
    openings=(
        "Hello,", "Hi there.", "Good morning.", "Hello team.", "Dear support,", "Hi, I hope you can help me.",
        "Hey folks, me again.", "Good afternoon, I bought something in your shop.",
        "Hello, I am writing about a recent purchase.", "Dear customer service,",
        "Hi, quick question for you.", "To whom it may concern.", "Hello and sorry to bother you.",
        "Hey, so here is my problem.", "Good day to you all.", "I am a regular customer of yours.",
    ),
    orders=(
        "My order number is {o}.", "The order is {o}.", "Order {o}.", "It was ordered under {o}.",
        "Reference {o}.", "You can find it under order {o}.", "The confirmation mail says {o}.",
        "This concerns order {o}.", "The number on the invoice is {o}.", "Order no. {o}, if that helps.",
        "It belongs to order {o}.", "I have {o} as the order number here.", "My reference is {o}.",
        "That was purchase {o}.", "The receipt shows number {o}.", "It's about order {o}.",
    ),
    no_orders=(
        "I cannot find the order number.", "Unfortunately I have no order number to hand.",
        "The order number is gone, I deleted the mail.", "I do not know the order number.",
        "I did not keep the order number.", "No order number was sent to me.", "Sorry, I have no number for it.",
        "I threw the receipt away, so there is no number.", "The number is not in my mailbox any more.",
        "I never got an order number.",
    ),
    urgent=(
        "This is urgent.", "Please answer as soon as possible.", "I need this solved by {d}.",
        "It has to be sorted out by {d} at the latest.", "Please hurry, it is for a birthday on {d}.",
        "I need a reply today.", "Please deal with this immediately.",
        "We are leaving on {d}, so it cannot wait.", "Please treat it as urgent.",
        "Time is short, I need it before {d}.", "I need help right now.", "It is very pressing.",
        "Could you look at this straight away?", "Please make it a priority, the deadline is {d}.",
        "I must have an answer by tomorrow.", "Quick help would be great, it is really urgent.",
        "It is urgent.", "I need it as soon as possible.", "Be quick please, {d} is the last possible day.",
        "I have to know by {d}.", "Please get this done today.", "I am running out of time.",
        "The matter is urgent, so answer quickly.", "Please handle this without delay.",
        "We really need it before the weekend.", "Please rush this, I travel on {d}.",
        "I need a solution within a day.", "There is no time to lose.", "It is needed for {d}, please be fast.",
        "I can only wait until {d}.", "Every hour counts here.", "It all has to be ready on {d}, so speed matters.",
    ),
    calm=(
        "There is no rush.", "It is not urgent.", "Take your time.", "No hurry with this.",
        "Whenever you get round to it is fine.", "It does not have to be today.", "There is plenty of time.",
        "This can wait until next month.", "I am in no hurry at all.", "An answer next week is soon enough.",
        "It is nothing pressing.", "Please answer when it suits you.", "I can wait a few weeks.",
        "There is no deadline for this.", "This is not a priority.", "Speed does not matter here.",
    ),
    closings=(
        "Thanks in advance.", "Thank you.", "Please let me know what happens next.", "What should I do now?",
        "Best wishes.", "I look forward to your reply.", "Kind regards, Anna.", "Could you look into it?",
        "I would be glad of an answer.", "Thanks a lot, Ben.", "Please write back to this address.",
        "Otherwise I have always been happy with your shop.", "Hope you can sort it out.", "Yours, Mr Novak.",
        "That is all I know.", "Have a nice day.",
    ),
    calm_share=0.4,
    no_order_every=5,
)

HELDOUT = Pool(
    products=(
        "kettle", "office chair", "backpack", "printer", "bike helmet", "bookshelf", "suitcase", "tablet",
        "rice cooker", "sofa", "camera", "standing desk", "hiking boot", "picture frame", "fan heater",
        "tea pot", "microphone", "baby stroller", "laptop sleeve", "garden bench",
    ),
    problems={
        "late": (
            "It is now twelve days and my {p} has not been delivered.",
            "The {p} is well overdue and I have heard nothing from the carrier.",
            "The shipment with my {p} is running very late.",
            "I keep checking the door, but the {p} has yet to arrive.",
            "My {p} was supposed to come on {d} and I am still without it.",
            "Delivery of the {p} has been delayed for a third time.",
            "The {p} has been on its way for over three weeks.",
            "Could you find out why my {p} has not arrived yet?",
        ),
        "damaged": (
            "The {p} turned up with a broken base.",
            "There are deep scratches on the {p} I unwrapped.",
            "My {p} was damaged in transit.",
            "The {p} has a crack and several dents.",
            "Someone must have crushed the parcel, as my {p} is bent out of shape.",
            "I found the {p} shattered when I took off the wrapping.",
            "The {p} came to us chipped and cracked.",
            "Half of the {p} is smashed.",
        ),
        "wrong_item": (
            "The box held a different item and not the {p} I paid for.",
            "What I got is the wrong product, it should have been the {p}.",
            "You have mixed up the parcels: I expected the {p} and found another item.",
            "I was sent the wrong model of the {p}.",
            "The {p} came in the wrong colour.",
            "I asked for the {p} and received something completely different.",
            "It seems I have another customer's item in place of my {p}.",
            "This {p} is a different size from what I ordered.",
        ),
        "refund": (
            "I brought back the {p} and want a refund.",
            "Please return my money for the {p}.",
            "My refund for the {p} has not been paid so far.",
            "I gave the {p} back two weeks ago, yet no money has reached my account.",
            "How do I get reimbursed for the {p} I sent back?",
            "The {p} does not suit us, so we would like the purchase price refunded.",
            "You owe me the money for the returned {p}.",
            "I am asking for a refund of the amount I paid for the {p}.",
        ),
        "cancel": (
            "I have to cancel my order of the {p}.",
            "Kindly cancel the {p}, we will not be needing it.",
            "Please do not send out the {p}, I have decided not to buy it.",
            "Can the order for the {p} be cancelled?",
            "I have second thoughts about the {p} and wish to cancel it.",
            "My partner already bought the {p}, so please cancel this order.",
            "Please stop the shipment of the {p}, I do not want it anymore.",
            "I would rather not buy the {p} after all, please call the order off.",
        ),
        "warranty": (
            "Does my {p} still have a valid warranty?",
            "I would like to know whether the guarantee on the {p} covers spare parts.",
            "The {p} gave out after fourteen months, can I claim on the warranty?",
            "Until when is my {p} covered by the guarantee?",
            "Please explain the warranty terms for the {p}.",
            "How do I file a guarantee claim for my {p}?",
            "What does the warranty of the {p} cover?",
            "Is the guarantee for the {p} valid abroad?",
        ),
    },
    openings=(
        "Greetings.", "Hi everyone.", "Good evening.", "Dear team,", "Hi, could somebody help me out?",
        "Hi, I have an issue with a purchase.", "Dear shop,", "Hey, a word about what I bought.",
    ),
    orders=(
        "The order in question is {o}.", "You will see it listed as {o}.", "Our order code is {o}.",
        "It is registered as {o} in your system.", "I placed it under number {o}.",
        "The order number reads {o}.", "All details are stored under {o}.",
        "On the packing slip it says {o}.",
    ),
    no_orders=("I have lost the order number, sorry.", "The order number is not within reach right now."),
    urgent=(
        "It is an urgent matter for me.", "I need to have this settled before {d}.",
        "Please get back to me as soon as you can, it is pressing.", "We need it done by {d}, no later.",
        "Please act at once, this can't wait.", "I am in a hurry, so please reply today.",
        "Please take care of it immediately, my deadline is {d}.", "This has to be fixed by tomorrow.",
    ),
    calm=("I am in no rush.", "No need to hurry.", "Please take all the time you need."),
    closings=(
        "Many thanks for your help.", "Cheers.", "Please tell me how we go on from here.",
        "I hope to hear from you.", "Warm regards, Lena.", "Thanks for looking at it.", "All the best.",
        "Let me know if you need anything else.",
    ),
    calm_share=0.2,
    no_order_every=10,
)
# fmt: on


def deck(rng: random.Random, items: Sequence[str]) -> Iterator[str]:
    """Yield the items in random order over and over, so that each is used about equally often."""
    while True:
        yield from rng.sample(items, len(items))


def compose(rng: random.Random, pool: Pool, problem: str, order: str | None, urgent: bool) -> str:
    """Put the parts of one message together; problem already names the product."""
    parts = {"opening": rng.choice(pool.openings), "problem": problem, "closing": rng.choice(pool.closings)}
    if order is not None:
        parts["order"] = rng.choice(pool.orders).replace("{o}", order)
    elif rng.random() < 0.5:
        parts["order"] = rng.choice(pool.no_orders)
    if urgent:
        parts["urgency"] = rng.choice(pool.urgent)
    elif rng.random() < pool.calm_share:
        parts["urgency"] = rng.choice(pool.calm)
    used = [parts[name] for name in rng.choice(LAYOUTS).split() if name in parts]
    return " ".join(part.replace("{d}", rng.choice(DAYS)) for part in used)


def generate(pool: Pool, name: str, count: int, taken: set[str]) -> list[Row]:
    """Make count rows whose messages are not in taken, and add them to it; each file has randomness of its own."""
    rng = random.Random(f"{SEED} {name}")
    products = deck(rng, pool.products)
    problems = {kind: deck(rng, sentences) for kind, sentences in pool.problems.items()}
    kinds = list(pool.problems)
    rows = []
    for number in range(count):
        turn, index = divmod(number, len(kinds))
        kind, product = kinds[index], next(products)
        # Fixed shares in each category: a third urgent, some without an order number.
        urgent = (turn + index) % 3 == 0
        no_order = (turn + 3 * index) % pool.no_order_every == 0
        order = None if no_order else f"{rng.choice(ORDER_LETTERS)}-{rng.randrange(1000, 10000)}"
        problem = next(problems[kind]).replace("{p}", product)
        message = ""
        while message in taken or not MIN_WORDS <= len(message.split()) <= MAX_WORDS:
            message = compose(rng, pool, problem, order, urgent)
        taken.add(message)
        record = {"type": kind, "product": product, "order": order, "urgent": urgent}
        rows.append(make_row(message, record))
    rng.shuffle(rows)
    return rows


def make_row(message: str, record: dict[str, str | bool | None]) -> Row:
    """One chat in the messages format."""
    answer = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    turns = (("system", SYSTEM), ("user", message), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def phrasings(pool: Pool) -> list[str]:
    """Every sentence a file is built from, products aside."""
    parts = (pool.openings, pool.orders, pool.no_orders, pool.urgent, pool.calm, pool.closings, *pool.problems.values())
    return [sentence.strip(".") for part in parts for sentence in part]


def count_kinds(rows: list[Row]) -> str:
    """The number of rows per category, as text."""
    counts = Counter(json.loads(row["messages"][-1]["content"])["type"] for row in rows)
    return ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))


def main(argv: list[str] | None = None) -> int:
    """Write the two files, or with --check compare them; return the exit status."""
    parser = argparse.ArgumentParser(description="Generate the quickstart data set.")
    parser.add_argument("--check", action="store_true", help="only compare the files on disk")
    check = parser.parse_args(argv).check

    shared = [(a, b) for a in phrasings(TRAIN) for b in phrasings(HELDOUT) if a in b or b in a]
    if shared:
        print(f"The two files share phrasings: {shared}", file=sys.stderr)
        return 1
    taken: set[str] = set()
    files = {
        "train.jsonl": generate(TRAIN, "train", TRAIN_ROWS, taken),
        "heldout.jsonl": generate(HELDOUT, "heldout", HELDOUT_ROWS, taken),
    }
    differing = []
    for name, rows in files.items():
        path = FOLDER / name
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        elif not path.is_file() or path.read_bytes() != data:
            differing.append(name)
        print(f"{name}: {len(rows)} rows ({count_kinds(rows)})")
    if differing:
        print(f"Differs from the generator: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
