"""The requests of the demo."""

from __future__ import annotations

from dataclasses import dataclass

# By kind: what a user asks for. Stories are long, the answers to questions short.
KINDS = {"story": "stories", "question": "questions"}
_STORIES = (
    "a lighthouse keeper",
    "a lost robot",
    "the first snow",
    "two rival bakers",
    "a talking river",
    "a night train",
    "an old violin",
    "a desert garden",
    "a paper boat",
    "the last librarian",
    "a clockmaker",
    "a brave snail",
)
_QUESTIONS = (
    "What is the capital of France?",
    "How many legs has a spider?",
    "What colour is the sky at noon?",
    "Who wrote Hamlet?",
    "What is seven times eight?",
    "Which planet is the largest?",
    "What is water made of?",
    "How many days has a leap year?",
    "What is the opposite of cold?",
    "Which ocean is the deepest?",
    "What do bees make?",
    "How many minutes has an hour?",
    "What is the tallest mountain?",
    "Which animal barks?",
    "What is frozen water called?",
    "Who painted the Mona Lisa?",
)
_STORY_TOKENS, _ANSWER_TOKENS = 200, 16
_STORY_EVERY_S, _QUESTIONS_FROM_S, _QUESTION_EVERY_S = 0.05, 1.0, 0.25


@dataclass(frozen=True)
class Ask:
    """A request: what is asked at which second, and how many tokens come back."""

    kind: str
    at_s: float
    prompt: str
    tokens: int


def burst() -> list[Ask]:
    """Stories within half a second, more than the batch has places; then the questions."""
    stories = [
        Ask("story", n * _STORY_EVERY_S, f"Write a long story about {about}.", _STORY_TOKENS)
        for n, about in enumerate(_STORIES)
    ]
    questions = [
        Ask("question", _QUESTIONS_FROM_S + n * _QUESTION_EVERY_S, text, _ANSWER_TOKENS)
        for n, text in enumerate(_QUESTIONS)
    ]
    return stories + questions


def warm_up(batch: int) -> list[Ask]:
    """An engine's first steps are slow; these are not counted."""
    return [Ask("story", 0.0, f"Count from {n} upwards.", 8) for n in range(batch)]
