"""What looks like personal data: known numbers with their check digits, and what only resembles them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.data.check.personal import find

MAIL, PHONE, ADDRESS = "an e-mail address", "a phone number", "an IP address"
ACCOUNT, CARD, SECURITY = "an account number (IBAN)", "a credit card number", "a US social security number"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to grace.hopper+navy@cs.yale.edu, please", MAIL),
        ("call +44 20 7946 0958 today", PHONE),
        ("call (212) 736-5000", PHONE),
        ("call 212-736-5000.", PHONE),
        ("the host 8.8.8.8 answers", ADDRESS),
        ("pay to DE89 3704 0044 0532 0130 00 now", ACCOUNT),  # the example of the European Committee for Banking
        ("pay to GB82WEST12345698765432", ACCOUNT),
        ("card 4111 1111 1111 1111", CARD),  # the usual test number
        ("card 378282246310005", CARD),
        ("number 078-05-1120", SECURITY),  # the number of a wallet advertisement of 1938
    ],
)
def test_personal_data_is_found(text: str, kind: str) -> None:
    assert list(find(text)) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "write to someone@example.com or me@mail.example.org or root@localhost",
        "call 212-555-0123",  # kept for fiction
        "the router is 192.168.0.1, the loopback 127.0.0.1, 300.1.1.1 is nothing",
        "DE88 3704 0044 0532 0130 00",  # a wrong check digit
        "4111 1111 1111 1112",
        "000-12-3456 and 900-12-3456",
        "In 1999-2003 it cost 1,234,567.89 dollars; pi is 3.14159265358979323846",
        "2 + 2 = 4, 12345678 * 87654321",
        "def f(x): return x @ y",
        "2023-11-21 08:15:24",
        "10/12/2021 11/12/2021",
    ],
)
def test_what_only_resembles_it_is_not(text: str) -> None:
    assert list(find(text)) == []


@given(st.text(alphabet="0123456789", min_size=12, max_size=15))
def test_exactly_one_check_digit_makes_a_card_number(digits: str) -> None:
    body = "4" + digits
    assert sum(CARD in find(f"{body}{last}") for last in range(10)) == 1
