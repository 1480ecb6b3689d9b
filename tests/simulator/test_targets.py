"""Targets: how they are read, and when one is met."""

import pytest

from fastserve_vllm.simulator.served import ServedRequest
from fastserve_vllm.simulator.targets import METRICS, Score, Scorecard, Target, TargetError
from fastserve_vllm.traces import Request


def served(first_s: float, last_s: float, *, gap_s: float = 0.1, tokens: int = 5) -> ServedRequest:
    return ServedRequest(Request("a", 10.0, 7, tokens), 10.0 + first_s, 10.0 + last_s, gap_s)


class TestReading:
    @pytest.mark.parametrize(
        ("text", "metric", "share", "limit_s"),
        [
            ("ttft_p95=0.5s", "ttft", 0.95, 0.5),
            ("ttft_p99.9=500ms", "ttft", 0.999, 0.5),
            ("normalized_mean=80ms", "normalized", None, 0.08),
            (" e2e_max=10s ", "e2e", 1.0, 10.0),
            ("gap_p50=2s", "gap", 0.5, 2.0),
            ("tpot_mean=.05s", "tpot", None, 0.05),
        ],
    )
    def test_a_target(self, text, metric, share, limit_s):
        """A metric, a statistic, a number and a unit."""
        target = Target.parse(text)
        assert (target.metric, target.share) == (metric, pytest.approx(share))
        assert target.limit_s == pytest.approx(limit_s)
        assert target.text == text.strip()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected METRIC_STATISTIC=NUMBER and a unit"),
            ("ttft=1s", "expected METRIC_STATISTIC=NUMBER and a unit"),
            ("ttft_p95<1s", "metrics are ttft, tpot, gap, e2e, normalized"),
            ("itl_p95=1s", "metric must be one of ttft, .*, got 'itl'"),
            ("ttft_p95=1", "unit must be one of s, ms, got ''"),
            ("ttft_p95=1us", "unit must be one of s, ms, got 'us'"),
            ("ttft_median=1s", "statistic must be mean, max, or p .*, got 'median'"),
            ("ttft_p100=1s", "a number between 0 and 100, as in p95, got 'p100'"),
            ("ttft_p0=1s", "a number between 0 and 100"),
            ("ttft_p95=0s", "the limit must be a number above 0, got '0'"),
            ("ttft_p95=-1s", "the limit must be a number above 0"),
            ("ttft_p95=1.2.3s", "the limit must be a number above 0, got '1.2.3'"),
        ],
    )
    def test_a_mistake(self, text, message):
        """The message names the part that is wrong, and what it accepts."""
        with pytest.raises(TargetError, match=message):
            Target.parse(text)


class TestMetrics:
    @pytest.mark.parametrize(
        ("metric", "seconds"),
        [("ttft", 1.0), ("tpot", 0.5), ("gap", 0.7), ("e2e", 3.0), ("normalized", 0.6)],
    )
    def test_of_a_request(self, metric, seconds):
        """By hand: 5 tokens, the first after 1 s, the last after 3 s."""
        assert METRICS[metric](served(1.0, 3.0, gap_s=0.7)) == pytest.approx(seconds)

    def test_an_answer_of_one_token(self):
        """It has no time between tokens, so it keeps every bound of it."""
        one = served(1.0, 1.0, gap_s=0.0, tokens=1)
        assert METRICS["tpot"](one) == METRICS["gap"](one) == 0


class TestScores:
    def run(self, text: str, ttfts: list[float]) -> Score:
        score = Score(Target.parse(text), len(ttfts))
        for seconds in ttfts:
            score.take(served(seconds, 9.0))
        return score

    @pytest.mark.parametrize(("over", "missed"), [(0, False), (5, False), (6, True)])
    def test_a_percentile(self, over, missed):
        """Of 100 requests, 5 may take longer than the 95th percentile's limit; it is counted."""
        score = self.run("ttft_p95=1s", [0.5] * (100 - over) + [1.5] * over)
        assert score.missed is missed
        assert score.reached == pytest.approx(1 - over / 100)

    def test_the_limit_itself_is_met(self):
        """At most, not less than."""
        assert not self.run("ttft_max=1s", [1.0] * 10).missed

    def test_fractions_do_not_round(self):
        """Of 1000 requests exactly one may exceed p99.9; 0.1 % of that many is not 0.9999."""
        assert not self.run("ttft_p99.9=1s", [0.5] * 999 + [2.0]).missed
        assert self.run("ttft_p99.9=1s", [0.5] * 998 + [2.0] * 2).missed

    @pytest.mark.parametrize(("last_s", "missed"), [(1.9, False), (2.1, True)])
    def test_a_mean(self, last_s, missed):
        """Of all requests."""
        score = self.run("ttft_mean=1s", [0.5, 0.5, last_s, 1.1])
        assert score.missed is missed
        assert score.reached == pytest.approx((2.1 + last_s) / 4)

    def test_missed_for_certain_before_the_end(self):
        """As soon as nothing that comes can help, and not sooner."""
        share, mean = (Score(Target.parse(f"ttft_{s}=1s"), 100) for s in ("p95", "mean"))
        for number in range(1, 12):
            share.take(served(11.0, 12.0))
            mean.take(served(11.0, 12.0))
            assert share.missed is (number > 5)
            assert mean.missed is (number > 9)

    def test_a_scorecard_names_what_is_missed(self):
        """Each target on its own."""
        card = Scorecard([Target.parse("ttft_max=1s"), Target.parse("e2e_max=2s")], 1)
        card.take(served(0.5, 3.0))
        assert [target.text for target in card.missed] == ["e2e_max=2s"]
