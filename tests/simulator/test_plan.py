"""`fastserve plan`: what it answers, and what it refuses."""

import json

import pytest
from click.testing import CliRunner

from fastserve_vllm.commands import main

SMALL = ("--workload", "sharegpt", "--requests", "400", "--cv", "2")
TARGET = ("--slo", "ttft_p95=0.1s")


def plan(*arguments):
    return CliRunner().invoke(main, ["plan", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What comes out where both policies are planned for."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    done = plan(*SMALL, "--load", 3.5, *TARGET, "--router", "round-robin", "--json", out)
    assert done.exit_code == 0, done.output
    assert "saving" in done.output
    return json.loads(out.read_text())


class TestAnswer:
    @pytest.mark.parametrize("policy", ["fcfs", "fastserve"])
    def test_it_was_tried(self, document, policy):
        """The size meets the targets, so does one more; one fewer misses or cannot keep up."""
        found = document["policies"][policy]
        size, tried = found["replicas"], found["tried"]
        assert tried[f"{size}"]["missed"] == []
        assert tried[f"{size}"]["figures"]["ttft_ms"]["p95"] <= 100 * 1.01
        assert tried[f"{size + 1}"]["missed"] == []
        if size > 4:
            assert tried[f"{size - 1}"]["missed"] == ["ttft_p95=0.1s"]

    def test_it_keeps_up(self, document):
        """No fleet is smaller than the load, which only a trace that ends could bear."""
        for found in document["policies"].values():
            assert min(int(size) for size in found["tried"]) >= 4

    def test_the_saving(self, document):
        """Of replicas, against the first policy; FastServe needs fewer here."""
        sizes = {name: found["replicas"] for name, found in document["policies"].items()}
        assert sizes["fastserve"] < sizes["fcfs"]
        saving = 1 - sizes["fastserve"] / sizes["fcfs"]
        assert document["savings"] == {"fastserve": pytest.approx(saving)}

    def test_every_size_gets_the_same_requests(self, document):
        """So sizes and policies differ in nothing else."""
        runs = [run for found in document["policies"].values() for run in found["tried"].values()]
        whole = [run["figures"] for run in runs if run["figures"] is not None]
        assert len({(one["prompt_tokens"], one["output_tokens"]) for one in whole}) == 1

    def test_same_seed_same_bytes(self, tmp_path):
        """I7, and another seed gives others."""
        texts = []
        for number, seed in enumerate((0, 0, 1)):
            out = tmp_path / f"{number}.json"
            flags = ("--seed", seed, "--replicas", 3, "--json", out)
            assert plan(*SMALL, "--load", 3, *flags).exit_code == 0
            texts.append(out.read_text())
        assert texts[0] == texts[1] != texts[2]


class TestAFixedSize:
    def test_what_is_missed(self):
        """No search: the verdict on each target, and what was reached."""
        flags = ("--load", 3, "--replicas", 3, "--slo", "e2e_max=1ms", "--slo", "ttft_mean=9s")
        done = plan(*SMALL, *flags)
        assert done.exit_code == 0, done.output
        assert done.output.count("missed (0.00%)") == 2
        assert done.output.count("met (") == 2

    def test_more_than_there_may_be(self):
        """Nothing meets this: the search ends, and says what the largest fleet misses."""
        done = plan(*SMALL, "--load", 2, "--slo", "e2e_max=1ms", "--max-replicas", 3)
        assert done.exit_code == 0, done.output
        assert done.output.count("over 3") == 2


class TestPrefixes:
    TRACE = "prompt_tokens,output_tokens,prefix,prefix_tokens\n" + "".join(
        f"{200 + n % 7},{20 + n % 30},p{n % 10},150\n" for n in range(60)
    )

    def test_affinity_needs_fewer_tokens(self, tmp_path):
        """A trace with prefixes: the router that keeps them together prefills less."""
        trace = tmp_path / "trace.csv"
        trace.write_text(self.TRACE)
        tokens = {}
        for router in ("prefix-affine", "round-robin"):
            out = tmp_path / f"{router}.json"
            flags = ("--router", router, "--replicas", 4, "--policy", "fastserve", "--json", out)
            done = plan("--trace", trace, "--requests", 200, "--load", 3, *flags)
            assert done.exit_code == 0, done.output
            run = json.loads(out.read_text())["policies"]["fastserve"]["tried"]["4"]
            tokens[router] = run["figures"]["prefill_tokens"]
        assert tokens["prefix-affine"] < tokens["round-robin"]

    def test_a_trace_without_them(self):
        """There is nothing to be affine to."""
        done = plan(*SMALL, "--load", 2, *TARGET, "--router", "prefix-affine")
        assert done.exit_code == 1
        assert "needs a trace with the columns prefix and prefix_tokens" in done.output

    @pytest.mark.parametrize(
        ("header", "row", "message"),
        [
            ("prefix", "a", "needs one of the columns prefix_tokens"),
            ("prefix,prefix_tokens", "a,many", "line 2: prefix_tokens must be a whole number"),
        ],
    )
    def test_a_bad_column(self, tmp_path, header, row, message):
        """The message says where."""
        trace = tmp_path / "trace.csv"
        trace.write_text(f"prompt_tokens,output_tokens,{header}\n100,100,{row}\n")
        done = plan("--trace", trace, "--load", 1, *TARGET)
        assert done.exit_code == 1
        assert message in done.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--load", 2, *TARGET), "give one of --workload and --trace"),
        (("--workload", "sharegpt", *TARGET), "give one of --load and --rate"),
        (("--workload", "sharegpt", "--load", 2), "give --slo at least once, or --replicas"),
        ((*SMALL, "--load", 2, "--rate", 3, *TARGET), "give one of --load and --rate"),
        ((*SMALL, "--load", 2, "--slo", "ttft_p95=1"), "unit must be one of s, ms"),
        ((*SMALL, "--load", 2, "--slo", "speed_p95=1s"), "metric must be one of ttft"),
        ((*SMALL, "--load", 2, *TARGET, "--router", "random"), "'least-loaded'"),
        ((*SMALL, "--load", 2, *TARGET, "--policy", "lifo"), "'lifo' is neither one of"),
        ((*SMALL, "--load", 2, *TARGET, "--policy", "json:Nothing"), "json has no class Nothing"),
        ((*SMALL, "--load", 2, *TARGET, "--replicas", 0), "0 is not in the range x>=1"),
    ],
)
def test_refused(flags, message):
    """The message names the option and what it accepts."""
    done = plan(*flags)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.split())
