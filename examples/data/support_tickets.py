"""Make the rows of examples/quickstart.yaml: `python support_tickets.py FOLDER [--seed N]`.

The task stands in every row, as its system text. Training rows are situations that are filled in twice, with other products, days
and openings. The held-out rows are other situations, each written out once: none of them is a training situation filled in anew,
so what is measured is whether the task was learned, not whether a sentence was seen.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SYSTEM = (
    "Sort the support ticket. Answer with category / priority. Categories: billing, shipping, technical, account, feedback. "
    "Priority: high if money, data or use is lost, low if nothing has to be done, else normal."
)
PRODUCTS = ("headset", "thermostat", "tablet", "doorbell", "smart lamp", "desk scale", "camera", "speaker", "router", "projector")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
OPENINGS = ("", "", "Hello, ", "Hi there, ", "Dear team, ", "Good morning. ")
CLOSINGS = ("", "", " Please help.", " Thanks!", " Regards, Kim", " Any idea?")

#: {p} a product, {n} a number, {d} a day, {m} a month
TRAINING: dict[str, tuple[str, ...]] = {
    "billing / high": (
        "I was charged twice for order {n}.",
        "you took {n} euros from my card and I never bought anything.",
        "the refund for the {p} was promised in {m} and never came.",
        "my card is still billed every month although I cancelled in {m}.",
        "I paid for the {p}, but the order was cancelled and the money is gone.",
        "the invoice says 89 euros, my bank took 189.",
        "a gift card of 50 euros was emptied without any order of mine.",
        "someone else's order was paid from my account on {d}.",
    ),
    "billing / normal": (
        "I need a receipt for the payment of {m}.",
        "the invoice for {m} shows the wrong VAT number.",
        "can I pay for order {n} by bank transfer?",
        "please send invoices to our accounting office from {m} on.",
        "how do I change the credit card of my subscription?",
        "our company name is misspelt on invoice {n}.",
        "does the yearly plan cost less than the monthly one?",
        "where do I enter the discount code for the {p}?",
    ),
    "billing / low": (
        "the refund for order {n} has arrived, nothing more to do.",
        "just so you know, we paid invoice {n} on {d}.",
        "the double charge was sorted out by my bank, you can close this.",
        "thank you for the corrected invoice of {m}.",
        "the discount worked after all, please ignore my last mail.",
    ),
    "shipping / high": (
        "the parcel with my {p} arrived crushed and it does not start.",
        "order {n} is marked as delivered, but nothing ever came.",
        "I got a {p} that belongs to somebody else, mine is missing.",
        "half of order {n} is missing from the box.",
        "the courier lost my {p} and nobody answers.",
        "the box was empty when I opened it on {d}.",
        "you sent the {p} to an address that I left years ago, it is gone.",
        "my {p} was stolen from the parcel, the seal was cut.",
    ),
    "shipping / normal": (
        "can you send the {p} to my office instead?",
        "order {n} has not moved since {d}, when does it come?",
        "is express delivery to Norway possible for the {p}?",
        "I will be away in {m}, please deliver later.",
        "which courier brings order {n}?",
        "may a neighbor take the parcel on {d}?",
        "how do I print the return label for the {p}?",
        "can order {n} and my next one come in one box?",
    ),
    "shipping / low": (
        "order {n} came a day early, very nice.",
        "the parcel turned up at the neighbor's, all is well.",
        "the missing cable was in the second box, sorry for the noise.",
        "the tracking page works again, no need to answer.",
        "the courier rang on {d} and the {p} is here, thank you.",
    ),
    "technical / high": (
        "the {p} does not turn on any more.",
        "all my recordings are gone after the update of {d}.",
        "the {p} gets so hot that it switches itself off.",
        "the app deletes my schedules every night.",
        "since the update the {p} finds no network at all.",
        "the screen of the {p} stays black after a restart.",
        "error E{n} appears and then nothing can be opened.",
        "the {p} stopped working on {d} and a reset does not help.",
    ),
    "technical / normal": (
        "bluetooth drops every few minutes on my {p}.",
        "how do I connect the {p} to a second phone?",
        "the clock of the {p} is an hour off.",
        "export to CSV takes ten minutes since {m}.",
        "which cable does the {p} need?",
        "the buttons of the {p} react a little late.",
        "can the {p} be used without the app?",
        "the app shows the temperature in Fahrenheit, how do I change that?",
    ),
    "technical / low": (
        "the update of {d} fixed my {p}, you can close the ticket.",
        "I found the reset button myself, thanks anyway.",
        "it was only the battery of the {p}, sorry.",
        "the {p} connects again since I moved the box, all good.",
        "error E{n} went away by itself, no answer needed.",
    ),
    "account / high": (
        "I cannot log in since {d} and need my files today.",
        "somebody changed my password, it was not me.",
        "two-factor codes are rejected on my new phone and I am locked out.",
        "my account was deleted with all photos in it.",
        "I see another customer's orders when I log in.",
        "a stranger is logged in to my {p} and I cannot remove him.",
        "all members of our team lost access on {d}.",
        "the password reset mail never comes, I cannot get in.",
    ),
    "account / normal": (
        "I want to change the mail address of my account.",
        "how do I add a colleague to our team?",
        "the invitation link expired on {d}, please send another.",
        "can I move the licence of the {p} to my sister?",
        "please merge my two accounts into one.",
        "my last name has changed, where do I enter it?",
        "how do I switch off the newsletter?",
        "which data do you keep about me?",
    ),
    "account / low": (
        "the login works again, I had a typo in my address.",
        "my colleague has access now, thanks.",
        "I found the setting for the language myself.",
        "the reset mail was in my spam folder, all is fine.",
        "just for your files: our office moved in {m}, the profile is changed already.",
    ),
    "feedback / low": (
        "I love the new look of the {p}.",
        "please bring back the old menu of the {p}.",
        "a dark mode would make the {p} perfect.",
        "your support on {d} was excellent.",
        "the manual of the {p} could have larger print.",
        "great product, my parents use the {p} every day.",
        "the survey that you sent in {m} was far too long.",
        "it would be nice if the {p} came in green.",
        "the sound of the {p} is better than I expected.",
        "the new app is not as pretty as the old one.",
        "I recommend the {p} to all my friends.",
        "a smaller box would save a lot of cardboard.",
        "my children find the voice of the {p} funny.",
        "I like that the {p} starts so fast.",
    ),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "billing / high": (
        "My statement lists the same purchase three times, and only one of them is mine.",
        "Why was I debited 240 euros when the price on the page was 24?",
        "I sent the lamp back in spring and still have not got my money.",
        "A trial that I ended is costing me 15 euros every week.",
        "The store credit I had last month shows zero now, although I used none of it.",
    ),
    "billing / normal": (
        "Could you add our purchase order number to the bill, our bookkeeping asks for it.",
        "Is it possible to split the amount into three instalments?",
        "I would like to get bills by post in the future.",
        "What is the tax rate on repairs?",
        "We need a quote for twenty units before we can order.",
    ),
    "billing / low": (
        "Good news, the missing repayment showed up in my bank today.",
        "I misread my statement, the amount is right, forget my question.",
        "Our accountant got the copy of the bill, that is settled.",
    ),
    "shipping / high": (
        "The van drove off with my package and the driver signed my name himself.",
        "Glass everywhere: whatever was in that carton is broken beyond use.",
        "Your warehouse packed a toaster, I had ordered and paid a monitor.",
        "Three weeks without a trace, the carrier says the consignment no longer exists.",
        "Two of the four chairs are not in the delivery.",
    ),
    "shipping / normal": (
        "Would it be possible to collect the goods at your shop myself?",
        "The house number is wrong on the label, please correct it before you dispatch.",
        "Do you deliver to islands?",
        "How long does it usually take to reach Portugal?",
        "I need a different size, how can I exchange it?",
    ),
    "shipping / low": (
        "No hurry any more, the package was behind the flower pots all along.",
        "Thanks for the quick dispatch, it was on my doorstep this morning.",
        "The carrier has apologized and brought everything, you may close the case.",
    ),
    "technical / high": (
        "My alarm system is dead, not a single light is on.",
        "Five years of measurements vanished when I pressed sync.",
        "After installing version 4 the device restarts endlessly, so I cannot use it.",
        "It smells burnt and there is no picture.",
        "The door lock refuses every code and we stand outside.",
    ),
    "technical / normal": (
        "Is there a way to make the display a bit brighter?",
        "The volume jumps sometimes when I switch songs.",
        "What does the blinking orange light mean?",
        "My watch shows the weather of the wrong town.",
        "Where can I download the driver for an older computer?",
    ),
    "technical / low": (
        "A restart was all it took, never mind.",
        "I had plugged it into the wrong socket, everything runs.",
        "Since yesterday the picture is sharp again, so this is done.",
    ),
    "account / high": (
        "A hacker got into my profile and ordered things.",
        "It says that my user does not exist, and with it went every document I had stored.",
        "None of us can sign in, the whole office stands still.",
        "Your page shows me the address and phone number of a person I do not know.",
        "I lost my phone and have no other way to confirm that it is me, so I am shut out.",
    ),
    "account / normal": (
        "Can two people share one profile?",
        "I would like to see a list of the devices that are signed in.",
        "Please take my old phone number off.",
        "Our trainee leaves next week, how can we take her permissions away?",
        "Is it possible to choose another user name?",
    ),
    "account / low": (
        "Caps lock was on, so there was nothing wrong with my password.",
        "Everybody in the group has received the invitation, many thanks.",
        "I have already updated my birthday, no action needed.",
    ),
    "feedback / low": (
        "What a lovely packaging, we kept it.",
        "Honestly, the earlier version was easier on the eyes.",
        "Maybe you could offer it in wood some day.",
        "The lady on the hotline was so patient with me, five stars.",
        "I wish the buttons were bigger for old hands.",
        "Best thing we bought this year.",
        "The advertisements in your magazine are a bit loud for my taste.",
        "You should make a version for left-handed people.",
    ),
}
FILLS = 2
"""How often a training situation is filled in"""


def row(ticket: str, label: str) -> dict[str, list[dict[str, str]]]:
    """A conversation: the task, a ticket, its sorting."""
    turns = {"system": SYSTEM, "user": ticket, "assistant": label}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def training_rows(seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Every training situation, filled in twice."""
    chosen = random.Random(seed)
    found = []
    for label, situations in TRAINING.items():
        for situation in situations:
            openings, closings = (chosen.sample(words, FILLS) for words in (OPENINGS, CLOSINGS))
            for opening, closing in zip(openings, closings, strict=True):
                text = situation.format(
                    p=chosen.choice(PRODUCTS), n=chosen.randint(100, 99999), d=chosen.choice(DAYS), m=chosen.choice(MONTHS)
                )
                text = text if opening.endswith(", ") else text[0].upper() + text[1:]
                found.append(row(opening + text + closing, label))
    chosen.shuffle(found)
    return found


def held_out_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Other situations, each as it was written."""
    return [row(ticket, label) for label, tickets in HELD_OUT.items() for ticket in tickets]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the fillings; the held-out rows are the same for every seed")
    arguments = parser.parse_args()
    for name, rows in (("support-tickets", training_rows(arguments.seed)), ("support-tickets-held-out", held_out_rows())):
        (arguments.folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


if __name__ == "__main__":
    main()
