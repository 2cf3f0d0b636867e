"""Small text jobs with real checkers, for training and judging a tiny block-diffusion model.

`TEXT_JOBS[name].sample(rng, split)` gives a prompt and its canonical response, `.check(prompt, answer)` judges any answer from the prompt
alone, `.content(prompt, response)` says what the held-out split is made of. `DECISION_JOBS` are questions with known probabilities, `CALLS`
requests that the functions of a prompt answer. `build_tokenizer` lives in `jobs.tokenizer`, because it needs transformers and the jobs need
nothing.
"""

from .calls import CALLS
from .dates import DATE
from .days import DAYS
from .decisions import DECISION_JOBS
from .job import SPLITS, Job, is_held_out
from .notes import NOTE_TO_JSON
from .number_pairs import NUMBER_PAIR
from .number_words import NUMBER_TO_WORDS, WORDS_TO_NUMBER
from .sorting import SORT
from .units import UNITS

_JOBS = (DATE, NUMBER_TO_WORDS, WORDS_TO_NUMBER, UNITS, SORT, NOTE_TO_JSON, NUMBER_PAIR, DAYS)
TEXT_JOBS: dict[str, Job] = {job.name: job for job in _JOBS}

__all__ = ["CALLS", "DECISION_JOBS", "SPLITS", "TEXT_JOBS", "Job", "is_held_out"]
