"""Records how an answer came about, and says it in numbers: what each step knew, since when each token stood, what was taken back.

python examples/trace.py
python examples/trace.py --canvas-length 16 --html trace.html --svg trace.svg --png trace.png

The first prints this: of each step how many tokens stand, how many it accepted, the mean entropy in nats, and the best guesses. A token
stands once its best guess is the one that is committed, and changes no more:

    Note to JSON: By 1 April 2036 Simon wants 71 summer bulbs for 66.75 euros.

    canvas 1, 48 tokens; steps after all of them stood: 1
      step  1  24 stand  19 accepted  0.32  {"name": "Simon", "quantity": 71, "item": "summer bulb", "price": 6.75, "date": "2036-04-01"}"}
      step  2  31 stand  30 accepted  0.21  {"name": "Simon", "quantity": 71, "item": "summer bulbs", "price": 677.5": "": "date36--4-0110"}
      step  3  36 stand  33 accepted  0.18  {"name": "Simon", "quantity": 71, "item": "summer bulbs", "price": 66..5, "date236----0110"}
      step  4  47 stand  45 accepted  0.02  {"name": "Simon", "quantity": 71, "item": "summer bulbs", "price": 66.75, "date": "2036-04-00"}
      step  5  48 stand  48 accepted  0.00  {"name": "Simon", "quantity": 71, "item": "summer bulbs", "price": 66.75, "date": "2036-04-01"}
      step  6  48 stand  48 accepted  0.00  {"name": "Simon", "quantity": 71, "item": "summer bulbs", "price": 66.75, "date": "2036-04-01"}
      changed after they had been accepted, how often: '2' 1, '0' 1, '4' 1, '-' 1, '1' 1
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Trace
from generation.watch.animation import draw_animation
from generation.watch.pictures import draw_trace, token_text, trace_page
from modeling_diffusiongemma import default_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Note to JSON: By 1 April 2036 Simon wants 71 summer bulbs for 66.75 euros.")
    parser.add_argument("--canvas-length", type=int, help="tokens; a longer answer takes several canvases (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--html", help="a page that plays it")
    parser.add_argument("--svg", help="a picture of it that moves")
    parser.add_argument("--png", help="a picture of it; needs matplotlib")
    args = parser.parse_args()
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    trace = Trace()
    model.generate(**inputs, watcher=trace, seed=args.seed, canvas_length=args.canvas_length, max_new_tokens=64)

    print(args.prompt)
    for place, canvas in enumerate(trace.row(), start=1):
        count, stood_at, revisions = len(canvas.tokens), canvas.stood_at(), canvas.revisions().tolist()
        print(f"\ncanvas {place}, {count} tokens; steps after all of them stood: {canvas.wasted()}")
        for index in range(len(canvas.steps)):
            stand, accepted = int((stood_at <= index).sum()), int(canvas.accepted[index, :count].sum())
            entropy = float(canvas.entropy[index, :count].float().mean())
            text = tokenizer.decode(canvas.argmax[index, :count], skip_special_tokens=True)
            print(f"  step {index + 1:2}  {stand:2} stand  {accepted:2} accepted  {entropy:.2f}  {text}")
        texts = [repr(token_text(tokenizer, token)) for token in canvas.tokens.tolist()]
        changed = [f"{text} {times}" for text, times in zip(texts, revisions, strict=True) if times]
        print(f"  changed after they had been accepted, how often: {', '.join(changed) or 'none'}")

    if args.html:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(trace_page(trace, tokenizer, args.prompt))
    if args.svg:
        with open(args.svg, "w", encoding="utf-8") as file:
            file.write(draw_animation(trace, tokenizer, args.prompt))
    if args.png:
        draw_trace(trace, tokenizer, args.png)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
