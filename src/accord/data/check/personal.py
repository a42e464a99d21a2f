"""What looks like personal data in a text. Patterns, with check digits where a number has them: a hint, no proof."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

__all__ = ["find"]

_EMAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_RESERVED = re.compile(r"@(?:[\w-]+\.)*(?:example(?:\.(?:com|net|org))?|test|invalid|localhost)$", re.IGNORECASE)
_DIGITS = re.compile(r"\d[\d .()/-]{5,}\d")
"""Everything below that is made of digits holds a piece like this; texts without one are done with."""
_PHONE = re.compile(
    r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4})(?![\w-])"
)
_FICTION = re.compile(r"555\D?01\d\d$")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{2,6}){2,4}(?![\w-]|\.\d)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")


def find(text: str) -> Iterator[str]:
    """Yield the kind of every piece that looks personal.

    Left out are names that no one owns: example.com and its like (RFC 2606), phone numbers kept for fiction (555-01xx)
    and addresses that are not public (RFC 1918 and others).
    """
    if "@" in text:
        for address in _EMAIL.findall(text):
            if not _RESERVED.search(address):
                yield "an e-mail address"
    if not _DIGITS.search(text):
        return
    for number in _PHONE.findall(text):
        if 8 <= len(_only_digits(number)) <= 15 and not _FICTION.search(number):
            yield "a phone number"
    for address in _IPV4.findall(text):
        if _is_public(address):
            yield "an IP address"
    for account in _IBAN.findall(text):
        if _is_iban(account.replace(" ", "")):
            yield "an account number (IBAN)"
    for card in _CARD.findall(text):
        if _is_card(_only_digits(card)):
            yield "a credit card number"
    for _ in _SSN.findall(text):
        yield "a US social security number"


def _only_digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:
        return False


def _is_iban(account: str) -> bool:
    """ISO 13616: moved to the back, letters as 10 to 35, the first four characters leave 1 modulo 97."""
    moved = account[4:] + account[:4]
    return 15 <= len(account) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _is_card(digits: str) -> bool:
    """The check digit of Luhn (ISO/IEC 7812): every second digit from the right doubled, the digits sum up to tens."""
    doubled = [int(digit) * (1 + k % 2) for k, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(value // 10 + value % 10 for value in doubled) % 10 == 0
