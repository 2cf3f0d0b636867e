"""Records how an answer came about, and says it in numbers: what each step knew, since when each token stood, what was taken back.

python examples/trace.py
python examples/trace.py --canvas-length 16 --html trace.html --png trace.png

The first prints this. A token stands once its best guess is the one that is committed, and changes no more:

    To JSON: Order from Quinn: 54 paper mirrors, due 4 December 2026.

    canvas 1, 39 tokens; steps after all of them stood: 1
      step  1  22 stand  14 accepted  0.517 nats  {"name": "Quinn", "quantity": 54, "item": "papap mirirsss", "date": "2022222----
      step  2  35 stand  27 accepted  0.187 nats  {"name": "Quinn", "quantity": 54, "item": "paper mirrors", "date": "2002-02--4"}
      step  3  39 stand  35 accepted  0.017 nats  {"name": "Quinn", "quantity": 54, "item": "paper mirrors", "date": "2026-12-04"}
      step  4  39 stand  39 accepted  0.000 nats  {"name": "Quinn", "quantity": 54, "item": "paper mirrors", "date": "2026-12-04"}
      changed after they had been accepted, how often: none
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Trace
from generation.watch.pictures import draw_trace, token_text, trace_page
from modeling_diffusiongemma import default_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="To JSON: Order from Quinn: 54 paper mirrors, due 4 December 2026.")
    parser.add_argument("--canvas-length", type=int, default=64, help="tokens; a longer answer takes several canvases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--html", help="a page that plays it")
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
            print(f"  step {index + 1:2}  {stand:2} stand  {accepted:2} accepted  {entropy:.3f} nats  {text}")
        texts = [repr(token_text(tokenizer, token)) for token in canvas.tokens.tolist()]
        changed = [f"{text} {times}" for text, times in zip(texts, revisions, strict=True) if times]
        print(f"  changed after they had been accepted, how often: {', '.join(changed) or 'none'}")

    if args.html:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(trace_page(trace, tokenizer, args.prompt))
    if args.png:
        draw_trace(trace, tokenizer, args.png)


if __name__ == "__main__":
    main()
