"""The console's command line: its commands, their arguments and help. What a command does stands in a file of its name.

Nothing here needs torch, and importing the package takes seconds. So a process that is the console reads its command line first:
where that asks for help or is wrong it is answered at once, and otherwise the import goes on, as in any other program.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..version import VERSION
from .arguments import (
    PROGRAM,
    UsageError,
    add_common,
    add_generation,
    add_weights,
    drop,
    integer,
    positive,
    say,
    share,
    size,
    with_reader,
    words,
)
from .constrained import add_constraint, add_fields, hint_at_choices
from .examples import BEGUN, read_examples
from .placement import DTYPES, add_loading, quantization_name

DESCRIPTION = "Text by block diffusion: a canvas of noise is denoised, all tokens in parallel, until it stands still."
EXAMPLES = """\
examples:
  diffusiongemma generate "Write 3 March 1998 as an ISO date." --watch
  diffusiongemma chat
  diffusiongemma info --model google/diffusiongemma-26B-A4B-it
  diffusiongemma COMMAND --help

exit codes: 0 fine, 1 the job failed, 2 wrong usage
"""

WATCHED = """
a token with --watch, in colour or by the marks below each step:
                                      accepted         corrected         renoised
  free                                green ^          magenta *         yellow .
  constrained, as some others fit     underlined +     underlined #      underlined :
  pinned, as no other one fits        no colour =      no colour =       no colour -
A token fits where an answer has it and all others as they are. Without a constraint all are free.
"""


@dataclass(frozen=True)
class Command:
    """A command of the console. `check` raises UsageError for arguments that are wrong together or on this disk. `hands_on`: whether its
    arguments, and its help, are another program's, and go there as they are."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None] | None
    examples: str
    hands_on: bool = False


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", type=words, metavar="PROMPT", help="what to answer (default: the lines of --file or standard input)"
    )
    parser.add_argument("--file", metavar="FILE", help="a prompt a line; - is standard input")
    parser.add_argument("--whole", action="store_true", help="the file or standard input is one prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    parser.add_argument("--system", type=words, metavar="TEXT", help="a system message before each prompt")
    parser.add_argument("--batch-size", type=integer(1), default=1, metavar="N", help="prompts at a time (default: 1)")
    parser.add_argument("--watch", action="store_true", help="show the canvas being denoised, on standard error")
    add_constraint(parser, tools=True)
    add_loading(parser)
    add_generation(parser)


def generate_check(args: argparse.Namespace) -> None:
    if args.watch and args.batch_size > 1:
        raise UsageError(f"`--watch` is given, and `--batch-size` is {args.batch_size}; expected 1: one canvas is drawn at a time")
    if args.raw and args.system is not None:
        raise UsageError("`--raw` and `--system` are both given; expected one: a system message needs the chat template")
    if args.raw and args.tools is not None:
        raise UsageError("`--raw` and `--tools` are both given; expected one: the chat template tells the model of its tools")
    if args.prompts and (args.file is not None or args.whole):
        raise UsageError("prompts are given, and `--file` or `--whole`; expected one or the other")
    if not args.prompts and args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(f"no prompt; expected one as an argument, in `--file`, or on standard input{hint_at_choices(args)}")
    if args.file not in (None, "-") and (os.path.isdir(args.file) or not os.access(args.file, os.R_OK)):
        raise UsageError(f"`--file` is {args.file!r}; expected a text file that can be read")


def fill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "template",
        type=words,
        metavar="TEMPLATE",
        help="text with blanks: {name:1-8} of 1 to 8 tokens, {name:3} of 3, {name} of any length",
    )
    parser.add_argument("--prompt", type=words, default="", metavar="TEXT", help="what is asked; the filled text is the answer")
    parser.add_argument("--raw", action="store_true", help="the filled text goes on from the prompt itself, without the chat template")
    parser.add_argument("--watch", action="store_true", help="show the canvas being denoised, on standard error")
    add_fields(parser)
    add_loading(parser)
    add_generation(parser)


def fill_check(args: argparse.Namespace) -> None:
    if args.raw and not args.prompt:
        raise UsageError("`--raw` is given without `--prompt`; expected a text from which the filled one goes on")
    if "{" not in args.template.replace("{{", ""):
        raise UsageError(f"TEMPLATE is {args.template!r}, which has no blank; expected one, such as {{name:1-8}}")


def revise_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("text", type=words, metavar="TEXT", help="what is to be mended")
    add("--prompt", type=words, metavar="TEXT", help="what it should answer, or an instruction (default: the text stands alone)")
    add("--raw", action="store_true", help="the text goes on from the prompt itself, without the chat template")
    add("--noise", type=share, metavar="X", help="the share of its tokens that become noise, in (0, 1] (default: 0.3)")
    add("--where", choices=("random", "uncertain"), default="random", help="which do: by the seed, or those that fit least")
    add("--at", type=words, action="append", metavar="TEXT", help="instead: just this piece of the text; repeatable")
    add("--keep", type=words, action="append", metavar="TEXT", help="a piece of the text that stays as it is; repeatable")
    add("--keep-others", action="store_true", help="nothing changes but what becomes noise, and the text's length neither")
    add("--watch", action="store_true", help="show the canvas being denoised, on standard error")
    add_constraint(parser)
    add_loading(parser)
    add_generation(parser)


def revise_check(args: argparse.Namespace) -> None:
    if not args.text:
        raise UsageError("TEXT is empty; expected the text that is to be mended")
    if args.raw and args.prompt is None:
        raise UsageError("`--raw` is given without `--prompt`; expected a text from which TEXT goes on")
    if args.at and args.noise is not None:
        raise UsageError("`--at` and `--noise` are both given; expected one: `--at` says itself what becomes noise")
    if args.at and args.where != "random":
        raise UsageError("`--at` and `--where` are both given; expected one: both say what becomes noise")
    if args.keep and args.keep_others:
        raise UsageError("`--keep` and `--keep-others` are both given; expected one")
    for name, given in (("at", args.at or ()), ("keep", args.keep or ())):
        for piece in given:
            if not piece or piece not in args.text:
                raise UsageError(f"`--{name}` is {piece!r}; expected a piece of TEXT")


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", type=words, metavar="PROMPT", help="what to answer")
    parser.add_argument("--html", metavar="FILE", help="a page that plays the denoising, for any browser, without a network")
    parser.add_argument("--png", metavar="FILE", help="a picture, positions by steps, coloured by entropy; needs matplotlib")
    parser.add_argument("--svg", metavar="FILE", help="a picture that moves, one step after another, for pages such as GitHub's; no script")
    parser.add_argument("--save", metavar="FILE", help="the trace itself, in safetensors, for generation.Trace.load")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    add_constraint(parser)
    add_loading(parser)
    add_generation(parser)


def trace_check(args: argparse.Namespace) -> None:
    given = {name: Path(value) for name in ("html", "png", "svg", "save") if (value := getattr(args, name)) is not None}
    for name, path in given.items():
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"`--{name}` is {str(path)!r}; expected a file in a folder that is there")
        try:  # now, since behind the answer it would be lost
            if not path.exists():
                with tempfile.TemporaryFile(dir=path.absolute().parent):
                    pass
            elif path.is_file():
                path.open("ab").close()
        except OSError as error:
            raise UsageError(f"`--{name}` is {str(path)!r}; expected a file that can be written ({error.strerror})") from error
    if len({path.absolute() for path in given.values()}) < len(given):
        raise UsageError(f"`--{'` and `--'.join(given)}` name one file; expected one for each")


def question(given: str) -> tuple[str, list[str]]:
    """`NAME=OPTION,OPTION`."""
    name, separator, options = words(given).partition("=")
    if not (name and separator and all(options.split(",")) and "," in options):
        raise argparse.ArgumentTypeError(f"got {given!r}; expected NAME=OPTION,OPTION, such as refund=yes,no")
    return name, options.split(",")


def decide_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", type=words, metavar="PROMPT", help="what is asked; the answer is a JSON object of the questions")
    parser.add_argument(
        "--question", type=question, action="append", required=True, metavar="NAME=A,B", help="a question and its options; repeatable"
    )
    parser.add_argument("--reads", type=integer(1), default=4, metavar="N", help="canvases of other noise, averaged (default: 4)")
    parser.add_argument("--steps", type=integer(1), default=1, metavar="N", help="denoising steps of each (default: 1)")
    parser.add_argument("--canvas-length", type=integer(1), metavar="N", help="narrower canvases, which is faster (default: the model's)")
    parser.add_argument("--raw", action="store_true", help="the answer goes on from the prompt itself, without the chat template")
    add_loading(parser)
    add_weights(parser)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", type=words, metavar="TEXT", help="a system message before the conversation")
    parser.add_argument("--no-watch", action="store_true", help="do not show the canvas being denoised")
    add_loading(parser)
    add_generation(parser)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", type=words, help="what is answered (default: one the shipped checkpoint knows; else a general question)"
    )
    parser.add_argument("--batch-size", type=integer(1), default=1, metavar="N", help="copies of the prompt at a time (default: 1)")
    parser.add_argument("--steps", type=integer(2), default=16, metavar="N", help="denoising steps timed one by one (default: 16)")
    parser.add_argument("--rounds", type=integer(1), default=3, metavar="N", help="measurements; their median is reported (default: 3)")
    add_loading(parser)
    add_generation(parser)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="where to write; new or empty")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds files already")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights written")
    parser.add_argument("--max-shard-size", type=size, metavar="SIZE", default="50GB", help="of one weight file, e.g. 5GB (default: 50GB)")


def export_check(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"FOLDER is {args.folder!r}, which is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UsageError(f"the folder {args.folder!r} is not empty; expected a new or empty one, or `--overwrite`")


def info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", nargs="?", const="", metavar="NAME",
        help="instead of a checkpoint: prove every fast path on this device (default: cuda if there is one, else cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true",
        help="where it would go on machines of several sizes in bf16, FP8 and NF4: GiB by place; and, of those, how many move in each step",
    )  # fmt: skip
    parser.add_argument(
        "--adapters", type=integer(1), metavar="RANK",
        help="what tuning it by LoRA of this rank keeps in memory in bf16, FP8 and NF4, with adapters of the experts and without",
    )  # fmt: skip


def info_check(args: argparse.Namespace) -> None:
    if args.plan and args.device is not None:
        raise UsageError("`--plan` and `--device` are both given; expected one: a plan is a checkpoint's")
    if args.adapters is not None and (args.plan or args.device is not None):
        other = "--plan" if args.plan else "--device"
        raise UsageError(f"`--adapters` and `{other}` are both given; expected one: each is a report of its own")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="FILE", help='examples, a line each: {"prompt": ..., "response": ...} or {"messages": [...]}')
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the result goes; new or empty, but for --resume")
    parser.add_argument("--lora", action="store_true", help="train an adapter, which needs peft, and leave the weights as they are")
    parser.add_argument("--rank", type=integer(1), metavar="N", help="of the adapter's matrices (default: 8)")
    parser.add_argument("--experts", action="store_true", help="adapt the experts too, beside attention and dense layers")
    parser.add_argument("--merge", action="store_true", help="write a checkpoint with the adapter in its weights, and no adapter")
    parser.add_argument("--eval", metavar="FILE", help="unseen examples: answers are generated and judged before and after")
    parser.add_argument("--eval-every", type=integer(1), metavar="N", help="steps between evaluations on the way (default: none)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=integer(1), default=3, metavar="N", help="times through the examples (default: 3)")
    length.add_argument("--steps", type=integer(1), metavar="N", help="optimizer steps, instead of --epochs")
    parser.add_argument("--batch-size", type=integer(1), default=8, metavar="N", help="examples a step (default: 8)")
    parser.add_argument("--lr", type=positive, metavar="X", help="highest learning rate (default: 1.5e-4 with --lora, else 5e-5)")
    parser.add_argument("--canvas-length", type=integer(1), metavar="N", help="train on narrower canvases, which is faster")
    parser.add_argument("--max-length", type=integer(1), metavar="N", help="most tokens of an example (default: the model's)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of order, noise and adapter (default: 0)")
    parser.add_argument("--save-every", type=integer(1), metavar="N", help="steps between checkpoints (default: a fifth of the run)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, of the same command line")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--report-to", nargs="+", metavar="NAME", help="trackers of transformers, such as tensorboard or wandb")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, the checkpoint's)")
    parser.add_argument("--quantize", type=quantization_name, metavar="NAME", help="of the frozen weights under --lora: fp8 or 4bit")


def train_check(args: argparse.Namespace) -> None:
    if not args.lora and (given := [name for name in ("rank", "experts", "merge", "quantize") if getattr(args, name)]):
        raise UsageError(f"`--{given[0]}` is given without `--lora`; expected both: it is about an adapter")
    if args.merge and args.quantize:
        raise UsageError("`--merge` and `--quantize` are both given; expected one: quantised weights are left as they are")
    if args.eval_every and not args.eval:
        raise UsageError("`--eval-every` is given without `--eval`; expected a file of unseen examples")
    if args.device not in (None, "cpu", "cuda"):
        raise UsageError(f"`--device` is {args.device!r}; expected cpu or cuda")
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`--out` is {args.out!r}, which is a file; expected a folder")
    begun = folder.is_dir() and any(folder.glob("checkpoint-*"))
    if args.resume and not begun:
        raise UsageError(f"`--resume` is given, and {args.out!r} holds no checkpoint; expected one to go on from")
    if not args.resume and folder.is_dir() and any(path.name != BEGUN for path in folder.iterdir()):
        hint = "or `--resume`, to go on from its last checkpoint" if begun else "since nothing is written over"
        raise UsageError(f"`--out` is {args.out!r}, which is not empty; expected a new or empty folder, {hint}")
    for path in filter(None, (args.data, args.eval)):
        read_examples(path)


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs="*", metavar="ARGUMENT", help="as `transformers serve` has them, and --help says")


COMMANDS: tuple[Command, ...] = (
    Command("generate", "answer prompts from arguments, a file or a pipe", generate_arguments, generate_check, """\
  diffusiongemma generate "Write 3 March 1998 as an ISO date." "What is 0.1 g in kg?"
  diffusiongemma generate "Write 3 March 1998 as an ISO date." --watch
  diffusiongemma generate --file prompts.txt --batch-size 16 --json > answers.jsonl
  cat prompts.txt | diffusiongemma generate --seed 0        # a line, a prompt; empty lines are passed over
  cat letter.txt | diffusiongemma generate --whole          # all of it, one prompt
  diffusiongemma generate "Write 3 March 1998 as an ISO date." --regex "\\d{4}-\\d\\d-\\d\\d"
  diffusiongemma generate "..." --schema order.json         # JSON that fits a schema; or --choices yes no
  diffusiongemma generate "Remind me in 25 minutes." --model tools --tools examples/tools.json
  diffusiongemma generate "..." --preset fast --set max_time=2.5
  diffusiongemma generate "..." --model google/diffusiongemma-26B-A4B-it --quantize 4bit --max-memory 0=20GB,cpu=12GB
  diffusiongemma generate "..." --model ./my-checkpoint --max-memory 12GB --offload-folder ./offload     # the rest from the disk
  diffusiongemma generate --model sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
""" + WATCHED),
    Command("fill", "fill in the blanks of a text, from both sides", fill_arguments, fill_check, """\
  diffusiongemma fill "1998-{month:1-2}-03" --prompt "Write 3 March 1998 as an ISO date."
  diffusiongemma fill "{year}-03-{day}" --regex "year=\\d{4}" --regex "day=\\d\\d" --prompt "Write 3 March 1998 as an ISO date." --watch
  diffusiongemma fill "It is a {kind}." --choices "kind=letter|invoice|complaint" --prompt "What is this? ..." --json
""" + WATCHED),
    Command("revise", "mend a text in place, from partial noise", revise_arguments, revise_check, """\
  diffusiongemma revise "1998-03-30" --prompt "Write 3 March 1998 as an ISO date." --where uncertain
  diffusiongemma revise "six hundred and fifty-eight" --prompt "Write 648 in words." --at fifty --keep-others
  diffusiongemma revise "1998-03-30" --prompt "Write 3 March 1998 as an ISO date." --noise 0.5 --keep 1998 --json
""" + WATCHED),
    Command("trace", "show how an answer came about, step by step", trace_arguments, trace_check, """\
  diffusiongemma trace "Write 3 March 1998 as an ISO date." --html date.html
  diffusiongemma trace "Write 648 in words." --html out.html --png out.png --svg out.svg --save out.safetensors
  diffusiongemma trace "Write 3 March 1998 as an ISO date." --regex "\\d{4}-\\d\\d-\\d\\d" --seed 0 --json

files that are there already are written over. The page: left and right go a step, space plays; point at a token for its entropy.
"""),
    Command("decide", "say how probable each answer to some questions is", decide_arguments, None, """\
  diffusiongemma decide "I was charged twice." --question refund=yes,no --question tone=calm,angry
  diffusiongemma decide "..." --question stars=1,2,3,4,5 --reads 16 --canvas-length 64 --json
"""),
    Command("chat", "talk to the model and watch its canvas", chat_arguments, None, """\
  diffusiongemma chat
  diffusiongemma chat --model ./my-checkpoint --device cuda --preset fast
  diffusiongemma chat --model google/diffusiongemma-26B-A4B-it --quantize fp8 --device cuda
  diffusiongemma chat --system "Answer in one word."
  printf 'Write 3 March 1998 as an ISO date.\\n/exit\\n' | diffusiongemma chat --json

in the chat: /reset forgets the conversation, /exit ends it (so does the end of input), /help says this.
Ctrl-C drops the answer being written. Green: accepted by the step; magenta: corrected; yellow: renoised.
"""),
    Command("bench", "measure how fast a checkpoint runs on this machine", bench_arguments, None, """\
  diffusiongemma bench
  diffusiongemma bench --model ./my-checkpoint --device cuda --dtype bfloat16 --batch-size 4
  diffusiongemma bench --prompt "Write a poem about canvases." --preset fast --json
"""),
    Command("train", "teach a checkpoint from a file of examples", train_arguments, train_check, """\
  diffusiongemma train data.jsonl --out runs/mine --lora --eval unseen.jsonl
  diffusiongemma train data.jsonl --out runs/mine --steps 200 --lr 1e-3 --canvas-length 64
  diffusiongemma train data.jsonl --out runs/mine --lora --model google/diffusiongemma-26B-A4B-it --quantize 4bit
  diffusiongemma train data.jsonl --out runs/mine --lora --resume      # after it was killed

--out then holds a checkpoint, for --model and serve, or with --lora an adapter, for --adapter of generate, fill, chat and bench.
"""),
    Command("serve", "answer OpenAI clients: transformers' server with this model", serve_arguments, None, """\
  diffusiongemma serve --port 8001              # the shipped checkpoints, loaded when a request names one
  diffusiongemma serve ./my-checkpoint          # one, and it alone
  diffusiongemma serve --help                   # all options: transformers' and ours
""", hands_on=True),
    Command("export", "write a checkpoint as a Hub repository that brings its own code", export_arguments, export_check, """\
  diffusiongemma export ./my-repository
  diffusiongemma export ./my-repository --model ./my-checkpoint --dtype bfloat16 --max-shard-size 5GB

the folder then loads anywhere, with this code, by
  AutoModelForCausalLM.from_pretrained("./my-repository", trust_remote_code=True)
and without trust_remote_code in transformers' own class. Upload it with: hf upload OWNER/NAME ./my-repository
"""),
    Command("info", "say what a checkpoint is without loading it", info_arguments, info_check, """\
  diffusiongemma info
  diffusiongemma info --model sudoku --json
  diffusiongemma info --model google/diffusiongemma-26B-A4B-it
  diffusiongemma info --model google/diffusiongemma-26B-A4B-it --plan
  diffusiongemma info --model google/diffusiongemma-26B-A4B-it --adapters 8
  diffusiongemma info --device
  diffusiongemma info --device cuda:1 --json
"""),
)  # fmt: skip


WRITES = ("train", "export")  # what is asked of these are files


def build_parser() -> argparse.ArgumentParser:
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES, **shape)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = command.summary[0].upper() + command.summary[1:] + "."
        one = commands.add_parser(command.name, help=command.summary, description=text, epilog=f"examples:\n{command.examples}", **shape)
        command.add_arguments(one)
        if not command.hands_on:
            add_common(one)
        one.set_defaults(check=command.check)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, by default the process's; SystemExit where it asks for help or is wrong, and has been answered, or where standard
    output takes no answer."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in [command.name for command in COMMANDS if command.hands_on]:
        return argparse.Namespace(command=argv[0], rest=argv[1:])
    try:
        with with_reader():  # of help
            args = build_parser().parse_args(argv)
    except OSError as error:  # now, and not behind the answers
        drop(sys.stdout)
        say(f"{PROGRAM}: error: standard output cannot be written: {error.strerror}")
        raise SystemExit(1) from None
    try:
        if sys.stdout is None and args.command not in WRITES:  # `>&-`; Python would print into nothing
            raise UsageError("standard output is closed; expected it open, since the answers go there")
        if args.check is not None:
            args.check(args)
        return args
    except (OSError, UsageError) as error:
        say(f"{PROGRAM} {args.command}: error: {error}")
        raise SystemExit(2) from None


def tell_uncaught(kind: type[BaseException], error: BaseException, traceback) -> None:
    """As Python's, but for Ctrl-C, which may come while the package is imported."""
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted")
    else:
        sys.__excepthook__(kind, error, traceback)


def answer_usage() -> None:
    """Where this process is the console, `python -m` with this package's name or the script that pip installed, and its command line asks
    for nothing that needs the package: answers, and ends."""
    script = Path(sys.argv[0] if sys.argv else "").resolve()
    if sys.argv[:1] == ["-m"]:  # Python is looking for the module to run
        is_console = sys.orig_argv[-len(sys.argv)] == __package__.split(".")[0]
    else:
        is_console = script.stem == PROGRAM and script.parent == Path(sysconfig.get_path("scripts")).resolve()
    if is_console:
        sys.excepthook = tell_uncaught
        parse()


__all__ = ["COMMANDS", "Command", "answer_usage", "build_parser", "parse"]
