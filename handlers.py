"""The customer-service menu of a small shop: edit it, and restart `python3 kfserver.py`.

A function takes the messages that its decorator names; what it returns is sent to the user. What it prints shows on the
server's terminal.
"""

from __future__ import annotations

import re

from kfserver import HandlerRegistry, Message

registry = HandlerRegistry()

MENU = "Hello! Send:\n1  opening hours\norder 12345  where your order is\nor just ask, and a colleague will answer."


@registry.on("text", "menu", "hi", "hello", "你好")
def menu(message: Message) -> str:
    print(f"{message.from_user_name} asks for the menu", flush=True)
    return MENU


@registry.on("text", "1")
def hours(message: Message) -> str:
    print(f"{message.from_user_name} asks for the hours", flush=True)
    return "We are here every day from 9 to 21 o'clock."


@registry.on("text", re.compile(r"order\s*#?(\d+)", re.IGNORECASE), re.compile(r"订单\s*(\d+)"))
def order(message: Message, number: str) -> list[str]:
    print(f"{message.from_user_name} asks for order {number}", flush=True)
    return [f"Looking for order {number}…", "It left our warehouse and arrives within two days."]


@registry.on("text")
def question(message: Message) -> str:
    print(f"{message.from_user_name} asks a colleague: {message.content}", flush=True)
    return "Thank you, a colleague will answer. Send \"menu\" for what I can do at once."


@registry.on("image")
def picture(message: Message) -> str:
    print(f"{message.from_user_name} sends a picture: {message.pic_url}", flush=True)
    return "We have your picture. Is it about an order? Send \"order\" and its number."


@registry.on("event", "user_get_coupon")
def coupon(message: Message) -> str:
    print(f"{message.from_user_name} took coupon {message.fields.get('CouponId', 'without a number')}", flush=True)
    return "Enjoy your coupon: it takes effect with your next order."


@registry.on("*")
def rest(message: Message) -> None:
    print(f"nothing to do for {message.msg_type or 'a message without a type'} {message.event}".rstrip(), flush=True)


@registry.on_error
def failed(message: Message, error: BaseException) -> None:
    print(f"message {message.key} failed for good: {type(error).__name__}", flush=True)
