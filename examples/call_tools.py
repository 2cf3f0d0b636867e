"""A request answered by functions: the model calls them, they run, and their results go back to it until it answers in words.

python examples/call_tools.py                                    three requests
python examples/call_tools.py "We need 8 red chairs. Then: Remind me in 25 minutes."

Every call names one of the functions and has arguments that its schema allows, at whatever temperature; whether it is the right one is up
to the model. The shipped checkpoint was taught requests such as these, and to give back a result as it is.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import ToolCalls
from modeling_diffusiongemma import default_checkpoint

TOOLS = json.loads((Path(__file__).parent / "tools.json").read_text(encoding="utf-8"))
REQUESTS = ("Put 12 blue mugs on the list.", "Remind me in 25 minutes.", "Tell Anna that the blue mugs are here.")
ROUNDS = 3  # of calls, at most

shopping: dict[str, int] = {}


def add_item(quantity: int, item: str) -> str:
    shopping[item] = shopping.get(item, 0) + quantity
    return f"{item} {shopping[item]}"


def set_timer(minutes: int, label: str = "timer") -> str:
    return f"{label} {minutes}"


def send_message(to: str, text: str) -> str:
    return f"letters {len(text)}"


FUNCTIONS = {function.__name__: function for function in (add_item, set_timer, send_message)}


def ask(model, tokenizer, chat: list[dict], settings: dict) -> dict:
    """The assistant's next message."""
    inputs = tokenizer.apply_chat_template(chat, tools=TOOLS, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    sequences = model.generate(**inputs, constraint=ToolCalls(TOOLS), tokenizer=tokenizer, **settings)
    return tokenizer.parse_response(tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :]), prefix="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", nargs="*", default=REQUESTS, help="what is asked")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 1 the model guesses more (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    args = parser.parse_args()
    path = default_checkpoint("tools")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    settings = {"max_new_tokens": 96, "temperature": args.temperature, "seed": args.seed}
    for request in args.requests:
        print(request)
        chat = [{"role": "user", "content": request}]
        for _ in range(ROUNDS):
            chat.append(message := ask(model, tokenizer, chat, settings))
            if not message.get("tool_calls"):
                print(f"  says: {message.get('content', '')}")
                break
            for call in message["tool_calls"]:
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                result = FUNCTIONS[name](**arguments)
                print(f"  calls {name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())}): {result}")
                chat.append({"role": "tool", "name": name, "content": result})


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
