"""`generate`: block-diffusion generation for any model that keeps `contract.GeneratesCanvases`. Nothing here knows how it works inside."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from .arguments import reads_arguments, shown
from .cache_names import takes_cache
from .call.caches import make_cache
from .call.configuration import DOWNLOAD, DiffusionGenerationConfig
from .call.constrained import bind, compile_languages
from .call.plan import Plan, make_plan
from .call.progress import Progress
from .call.prompt import IMAGES, Prompt, read_prompt
from .call.settings import resolve_config, resolve_stopping
from .call.together import allowed_tokens, check_arguments
from .constraints.automaton import Automaton
from .constraints.languages import Choice, Language, Template
from .contract import check_contract, passes_in_step
from .decisions.calibration import Calibration
from .decisions.deciding import decide
from .decisions.questions import Decisions
from .decisions.requests_form import DecidesRequests, decide_request
from .filling import Filled, fill
from .loop.autoregressive import decode_autoregressively
from .loop.canvases import decode_canvases
from .loop.rows import Rows
from .loop.transcript import Criteria, Transcript
from .loop.verified import decode_verified
from .output import DiffusionGenerationOutput, TokenScores
from .renoising import Positions
from .revising import Revised, revise
from .rules.constraint import Constraint, is_constraint
from .rules.draws import BatchDraws, row_draws
from .rules.stopping import StoppingRule
from .watch.callback import gather_watchers
from .watch.watcher import Watcher

# Each takes the model, the plan, the prompt, the rows, the transcript and the watchers, and returns the cache if it is whole.
DECODERS = {"diffusion": decode_canvases, "autoregressive": decode_autoregressively, "verified": decode_verified}


def start_rows(
    config: DiffusionGenerationConfig, plan: Plan, prompt: Prompt, model_config, seed, generator, constraint: Constraint | None,
    progress: Progress | None,
) -> Rows:  # fmt: skip
    """All rows of the batch, nothing being written yet; with the caller's cache, or one of their own."""
    cache, copies, device, reference = prompt.cache, prompt.copies, prompt.real.device, config.backend == "reference"
    if config.decoding == "diffusion" and cache is None:
        cache = make_cache(config, model_config.get_text_config(), plan.lengths.cache, device)
    if reference:
        draws = BatchDraws(generator)
    else:
        draws = row_draws(seed, generator, len(prompt.ids) // copies, copies, fixed=plan.rules.greedy)
    places = torch.arange(len(prompt.ids), device=device)
    return Rows(places, cache, prompt.real, prompt.ids, 0, draws, plan.rules.shaping.filters, constraint, progress, reference)


@contextlib.contextmanager
def arithmetic(model, config: DiffusionGenerationConfig) -> Iterator[None]:
    """The model compiled, or rounding as the reference does, for the length of the block, as `config` asks."""
    with contextlib.ExitStack() as stack:
        if config.compile_config is not None and not config.disable_compile:
            stack.enter_context(model.compiling(config.compile_config))
        if config.backend == "reference" and hasattr(model, "reference_arithmetic"):
            stack.enter_context(model.reference_arithmetic())
        yield


def in_step(generate: Callable) -> Callable:
    """`generate` inside the model's `in_step`, where it has one: what is refused before a pass must not leave other processes waiting."""

    @functools.wraps(generate)
    def together(self, *args, **kwargs):
        with passes_in_step(self):
            return generate(self, *args, **kwargs)

    return together


class DiffusionGenerationMixin(DecidesRequests, GenerationMixin):
    """Gives a model `generate` by block diffusion.

    `not_called`: methods that other implementations of `generate` call and this one does not, and what does the same here: a model on which
    one is defined is refused.
    """

    generation_config_class = DiffusionGenerationConfig
    not_called: Mapping[str, str] = {}

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, trust_remote_code=None, **kwargs
    ) -> None:
        """Called by `from_pretrained`: takes the given generation config, or reads the checkpoint's generation_config.json."""
        come_from = {"_from_auto": from_auto_class, "_from_pipeline": from_pipeline}
        self._load_generation_config(generation_config, pretrained_model_name_or_path, **come_from, **kwargs)
        if self.generation_config.temperature is None:
            self.generation_config.temperature = 1.0  # or a pipeline's own default of 0.7 would scale the released schedule
        self.load_decisions(pretrained_model_name_or_path, **{name: kwargs[name] for name in DOWNLOAD if name in kwargs})

    def _load_generation_config(self, generation_config: GenerationConfig | None, name, **kwargs) -> None:
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_generation_config(generation_config)
            return
        if name is None:  # a state dict was given instead of a checkpoint
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(name, **kwargs)
        except OSError as error:  # no such file: the released defaults apply in `generate`
            if isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError | TypeError):
                raise  # there is one, and it is broken

    @torch.no_grad()
    @in_step
    @takes_cache
    @reads_arguments
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        logits_processor: Sequence[Callable] | None = None,
        stopping_criteria: Sequence[Callable] | None = None,
        streamer: BaseStreamer | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        tokenizer=None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        watcher: Watcher | Sequence[Watcher] | None = None,
        constraint: Language | Automaton | Constraint | Sequence[Language | Automaton | None] | None = None,
        first_step: int | None = None,
        self_conditioning_logits: torch.Tensor | None = None,
        stopping: StoppingRule | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Mapping[str, torch.Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **kwargs,
    ) -> torch.Tensor | DiffusionGenerationOutput:
        """Continues every prompt, one canvas after another, in four moves.

        1. read: what is given becomes one configuration and a `Prompt`; whatever is wrong with it is said here, before anything is
           drawn, cached or told.
        2. plan: the `Plan` holds lengths, rules and how they are run; `Rows` what belongs to the rows of the batch.
        3. decode: prefill, denoise a canvas step by step (each `Prediction` advances the `CanvasState`), commit it, and the next one;
           or in one of the two other ways. The `Transcript` collects what is written and ends rows.
        4. collect: token ids, or the output object.

        Args:
            inputs, input_ids (`int64 (B, P)`): the prompts, padded on the left; the two names mean the same. With
                `cache`: the tokens that are not in the cache yet.
            generation_config (*optional*): a `DiffusionGenerationConfig`, any `GenerationConfig`, or a mapping of fields. Default: the
                model's.
            logits_processor (*optional*): a list, applied to the raw logits `(B, C, V)`, first of all. Processors with a `cur_step`
                argument get the remaining steps, as transformers' model gives them. transformers' own classes, written for
                `(rows, V)`, are applied position by position, or refused by name (generation/README.md).
            stopping_criteria (*optional*): a list, each asked once after every token, in order, with all that is written up to it and what
                has ended padded, as where tokens come one by one; a row is cut where one ends it. Those of time and
                `generation.AfterCanvas`, and with the reference backend all of the caller's, are asked after each canvas.
            streamer (*optional*): gets the prompt `(B, P)` and finished canvases, `(n,)` of one row and `(B, n)` of several, by
                `put`, the argmax canvas of each step by `put_draft` and the whole `CanvasState` by `put_state`, where it has these.
                It is ended where generation is: as elsewhere in transformers, a failure does not read as a finished answer.
            attention_mask (`(B, L + P)`, *optional*): 0 at padding, cached tokens included. Default: `pad_token_id` at the beginning of a
                row is padding, where that is no end of sequence too.
            inputs_embeds (`(B, P, D)`, *optional*): embeddings of the prompts instead of their ids, scaled as `get_input_embeddings()`
                scales them. The sequences that are returned then hold the new tokens alone.
            cache (*optional*): a cache of an earlier turn, or an empty one to be filled and kept.
            decoder_input_ids (`int64 (B, n * C)`, *optional*): the first canvas, or the first n. Default: noise.
            first_step (*optional*): the denoising step from which these are taken on, or a list with one for each. Default: 0, as if they
                were noise. At `max_denoising_steps` a canvas is taken as it stands, unless a row's constraint refuses it there: that row
                takes the last step.
            self_conditioning_logits (`(B, C, V)`, or `(C, V)` for every row, *optional*): what conditions the first step of the first
                canvas, as the shaped logits of a step before would. Default: nothing.
            stopping (*optional*): a `generation.rules.stopping.StoppingRule`, instead of `stability_threshold`, `confidence_threshold`,
                `joint_threshold` and `patience`, which do not go with it in one call.
            callback_on_step_end (*optional*): a function that is called at the end of every denoising step and may change it,
                `(model, step, noise_proportion, state) -> dict or None`; what it gets and may change: `generation.watch.callback`.
            callback_on_step_end_tensor_inputs (*optional*): names of what `state` holds. Default: all but `logits`, which are whole ones.
            watcher (*optional*): a `generation.watch.watcher.Watcher`, or a list of them: each is told of every step, as those before it
                left the state, and of every canvas, and may change the state.
            constraint (*optional*): what is written must be a text of this language: one of `generation.constraints`, or a list with one,
                or None, for each prompt. Exact in every step (generation/README.md); the text ends with an end-of-sequence token, or where
                a row may get no more tokens. Or a `generation.rules.constraint.Constraint`: what it makes of each prediction is what
                counts.
            seed (*optional*): one for every row, or one a prompt. A row's tokens depend on its prompt and its seed alone.
            generator (*optional*): source of the rows' seeds, or one generator a row. Default: torch's global one.
            tokenizer (*optional*): needed for `stop_strings`, and for a `constraint` on the text.
            pixel_values, image_position_ids, mm_token_type_ids (*optional*): images, from the processor.
            kwargs: any field of `DiffusionGenerationConfig`. `stability_threshold=None` or `confidence_threshold=None` here, and not in a
                config, mean never to stop early: every canvas takes `max_denoising_steps`.

        Returns:
            Token ids `(B * num_return_sequences, P + N)`, N new ones, trimmed to the allowed length and cut after the first
            end-of-sequence token of each row (then padded); or `DiffusionGenerationOutput` if `return_dict_in_generate`.

        Raises:
            ValueError: an argument that is unknown, out of range, or not honoured, by name; virtual tokens of peft; NaN logits; what a
                callback, constraint, sampler or stopping rule of the caller's returns, if it does not fit.
        """
        given = dict(locals())  # the arguments, by their names
        # 1. Read.
        check_contract(self, [name for name in IMAGES if given[name] is not None])
        stopping = resolve_stopping(stopping, kwargs)
        config, use_max_length = resolve_config(generation_config, self.generation_config, kwargs)
        check_arguments(self, config, given)
        prompt = read_prompt(self, config, given)
        criteria = Criteria.of(stopping_criteria, config, len(prompt.ids))
        watchers = gather_watchers(self, config.max_denoising_steps, given)
        # 2. Plan.
        seeing = constraint if is_constraint(constraint) else None  # predictions; and not what the text must be
        language, size = constraint if seeing is None else None, self.config.get_text_config().vocab_size
        automata = compile_languages(language, tokenizer, len(prompt.ids) // prompt.copies, prompt.copies, size)
        new_tokens = allowed_tokens(config, use_max_length, prompt.real.shape[1])
        counted = bool(criteria.of_callers())
        plan = make_plan(self, config, prompt, new_tokens, logits_processor, watchers, seeing, stopping, counted)
        rows = start_rows(config, plan, prompt, self.config, seed, generator, seeing, bind(automata, plan, prompt.real.device))
        # 3. Decode.
        transcript = Transcript(plan, prompt.ids, config.stop_strings, tokenizer, criteria, watchers)
        with arithmetic(self, config):
            cache = DECODERS[config.decoding](self, plan, prompt, rows, transcript, watchers)
        for each in watchers:
            each.end()
        # 4. Collect.
        return transcript.output(cache) if config.return_dict_in_generate else transcript.sequences()

    def fill(self, template: str | Template, tokenizer, prompt: str | Sequence[dict[str, Any]] | None = None, **settings) -> Filled:
        """Fills in the blanks of a text, each from what stands on both of its sides.

        Args:
            template: a string with blanks, as `generation.Template` reads it: `"Dear {name:1-8}, your order of {day:3} ..."`; or a
                `Template`, whose fields may have languages of their own.
            tokenizer: the model's.
            prompt (*optional*): what comes before: a chat, by the chat template, or a text that the filled one goes on from. Default:
                nothing but the beginning of a sequence.
            settings: any argument of `generate` but the prompt and the constraint.

        Returns:
            `Filled`: text, the fields' values, and tokens.

        Raises:
            ValueError: as `generate`; an end by `max_time` or stop strings before the text was whole.
        """
        return fill(self, template, tokenizer, prompt, **settings)

    def revise(
        self, text: str, tokenizer, prompt: str | Sequence[dict[str, Any]] | None = None, noise: float | None = None,
        keep: Positions | str | None = None, where: Positions | str = "random", **settings,
    ) -> Revised:  # fmt: skip
        """Writes some of a text's tokens anew, seeing all others: they become noise, and the text's canvases are denoised from the step on
        whose noise proportion they have.

        Any token may change that is not kept, not those alone that became noise; and so may the text's length, inside the canvas that it
        ends on: without `keep="others"` it ends where the model, or the constraint, ends it.

        Args:
            text: as it stands; of no more tokens than `max_new_tokens` allows.
            tokenizer: the model's.
            prompt (*optional*): what comes before: a chat, by the chat template, with the instruction in it, or a text. Default: nothing
                but the beginning of a sequence.
            noise (*optional*): the share of the text's tokens, without those kept, that become noise, in (0, 1]; at least one does.
                Default: 0.3; None where `where` tells the positions.
            keep (*optional*): tokens that stay what they are, at every step: positions, a bool for each token, pairs (start, stop) of
                characters, or a list of strings of the text; "others": all that do not become noise, and the text's length.
            where: which tokens become noise: "random", by the seed; "uncertain", those that one pass over the text finds least likely; or
                just these, in the forms of `keep`.
            settings: any argument of `generate` but the prompt and the canvas: `constraint`, `seed`, `sampler`, `watcher` and others.

        Returns:
            `Revised`: text, tokens, which became noise, which changed, and denoising steps.

        Raises:
            ValueError: a text that is empty, too long, or not what its tokens write; a share or positions outside of theirs; `keep` that
                leaves nothing, or contradicts `where` or the constraint; as `generate`.
        """
        return revise(self, text, tokenizer, prompt, noise, keep, where, **settings)

    def decide(
        self, prompt: str | Sequence[dict[str, Any]] | None = None, questions: Mapping[str, Choice] | None = None, tokenizer=None, *,
        calibration: Calibration | None = None, **settings,
    ) -> Decisions | list[torch.Tensor]:  # fmt: skip
        """How probable each option of some questions is as the answer, from canvas passes over the answer alone (docs/decisions.md).

        Args:
            prompt: a chat, by the chat template, or a text as it stands; the answer is a JSON object of the questions' names.
            questions: by name, `Choice([...])` each.
            tokenizer: the model's.
            calibration (*optional*): default: the checkpoint's `decision.json`; `Calibration()` for none.
            settings: `reads`, canvases of other noise over which probabilities are averaged (default 4); `steps`, denoising steps of each
                (default 1); `seed` of the noise (default 0); `canvas_length` (default: the model's); `cache`, a `DynamicCache` of one row
                with what stands before the prompt, which stays as it is. Or, instead of all of these, what transformers' pipeline
                "decision" hands in: `input_ids`, `marks`, `decision_questions`, `decision_config` (`decisions.requests_form`).

        Returns:
            `Decisions`; in transformers' form of every question the calibrated log-probabilities of its labels, float32 (options,).

        Raises:
            ValueError: what does not fit, by name, before anything is computed.
        """
        if "input_ids" not in settings:
            return decide(self, prompt, questions, tokenizer, calibration, **settings)
        if prompt is not None or questions is not None or calibration is not None:
            raise ValueError("`input_ids` and `prompt`, `questions` or `calibration` are given; expected one form of `decide` or the other")
        missing = dict.fromkeys(("marks", "decision_questions"))
        return decide_request(self, **{**missing, **settings}, tokenizer=tokenizer)

    def compute_transition_scores(
        self, sequences: torch.Tensor, scores, beam_indices: torch.Tensor | None = None, normalize_logits: bool = False
    ) -> torch.Tensor:
        """Log-probabilities of the new tokens, `(B, N)`, from the `scores` of an output, which hold them already.

        Raises:
            ValueError: `scores` of another kind, beams, or `normalize_logits=False`: what is kept is normalised.
        """
        if not isinstance(scores, TokenScores):
            raise ValueError(f"`scores` is {shown(scores)}; expected the `scores` of an output with `output_scores=True`")
        if beam_indices is not None:
            raise ValueError(f"`beam_indices` is {shown(beam_indices)}; expected None: a canvas has no beams")
        if not normalize_logits:
            raise ValueError(f"`normalize_logits` is {normalize_logits!r}; expected True: log-probabilities are kept, not logits")
        return scores.log_probs

    @property
    def init_continuous_batching(self):
        """Absent: transformers' server asks for it, and without it calls `generate`."""
        raise AttributeError("init_continuous_batching")

    def generate_batch(self, *args, **kwargs):
        """Refused: transformers' continuous batching schedules single tokens."""
        raise ValueError("`generate_batch` schedules single tokens, and a canvas is written as a whole; expected a call of `generate`")


__all__ = ["DiffusionGenerationMixin"]
