"""What a prompt's length tells of the length of its answer, learned from the answers that ended."""

from dataclasses import dataclass
from math import log2, sqrt

# What is remembered of an answer when the next one ends: 200 answers count in the long run.
_MEMORY = 0.995
# A class that fewer answers than this are remembered of is forgotten.
_LEAST_WEIGHT = 0.1
# Answers of average length that each class begins with.
_PRIOR_WEIGHT = 4.0
_CLASSES_PER_OCTAVE = 2


@dataclass(slots=True)
class _Answers:
    """Answers to prompts of a class: how many, and the service that they took, seconds."""

    weight: float = 0.0
    service_s: float = 0.0


class AnswerLengths:
    """Mean service of answers, by classes of prompt lengths, half an octave each.

    Prompts of about the same length often are of the same use, and so are the lengths of their
    answers; or they tell nothing. What a class says is therefore taken as far as classes have
    explained answers so far: the share of the variance that is between them (the adjusted
    coefficient of determination) less a standard deviation of what chance makes of it; at least 0.

    Learning and asking cost O(C) for the C classes, some tens.
    """

    def __init__(self) -> None:
        self._all = _Answers()
        self._squares = 0.0
        self._classes: dict[int, _Answers] = {}
        self._ended: list[tuple[int, float]] = []

    def end(self, prompt_tokens: int, service_s: float, *, running: bool) -> None:
        """An answer to such a prompt has ended after so much service as was charged so far.

        If it ran, the steps charged next were its last ones. Without service it tells nothing: it
        was given up while it waited.
        """
        if running:
            self._ended.append((prompt_tokens, service_s))
        elif service_s:
            self.learn(prompt_tokens, service_s)

    def charge(self, step_s: float) -> None:
        """The steps in which the last ones ran have been charged."""
        for prompt_tokens, service_s in self._ended:
            self.learn(prompt_tokens, service_s + step_s)
        self._ended.clear()

    def learn(self, prompt_tokens: int, service_s: float) -> None:
        """An answer to such a prompt took so many seconds of service."""
        self._forget()
        for answers in (self._all, self._classes.setdefault(_class(prompt_tokens), _Answers())):
            answers.weight += 1.0
            answers.service_s += service_s
        self._squares += service_s * service_s

    def longer_s(self, prompt_tokens: int) -> float:
        """Service that the answer is expected to take beyond that of any answer, seconds."""
        answers = self._classes.get(_class(prompt_tokens))
        if answers is None:
            return 0.0
        beyond_s = answers.service_s - answers.weight * self._all.service_s / self._all.weight
        return self.explained * beyond_s / (answers.weight + _PRIOR_WEIGHT)

    @property
    def explained(self) -> float:
        """How far classes are believed, 0 to 1."""
        count, classes = self._all.weight, len(self._classes)
        spare = count - classes
        if spare <= 0:
            return 0.0
        common = self._all.service_s**2 / count
        total = self._squares - common
        # All alike but for rounding: there is nothing to explain.
        if total <= 1e-9 * self._squares:
            return 0.0
        between = sum(seen.service_s**2 / seen.weight for seen in self._classes.values()) - common
        unexplained = (1.0 - between / total) * (count - 1.0) / spare
        chance = sqrt(2.0 * (classes - 1)) / spare
        return max(1.0 - unexplained - chance, 0.0)

    def _forget(self) -> None:
        for answers in (self._all, *self._classes.values()):
            answers.weight *= _MEMORY
            answers.service_s *= _MEMORY
        self._squares *= _MEMORY
        self._classes = {
            key: seen for key, seen in self._classes.items() if seen.weight >= _LEAST_WEIGHT
        }


def _class(prompt_tokens: int) -> int:
    return round(_CLASSES_PER_OCTAVE * log2(max(prompt_tokens, 1)))
