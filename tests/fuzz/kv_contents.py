"""What is in every block: a model that answers right only if each KV entry that it reads is right.

An entry stands for a token and all tokens before it, as KV cache does. Who computes on an entry
that is not that of its own tokens, because it never arrived, came from elsewhere or was written
over, computes ruined entries and a wrong token from there on.
"""

import itertools
from dataclasses import dataclass

from fastserve_vllm.kv_swap.copies import share_blocks
from fastserve_vllm.kv_swap.transfers import Direction

_EMPTY = 0


def extend(entries, tokens):
    """Make `entries` those of all of the tokens."""
    entry = entries[-1] if entries else 1
    for token in tokens[len(entries) :]:
        entry = hash((entry, token))
        entries.append(entry)


def answer(entry):
    """The token that follows the tokens of an entry."""
    return 10 + (entry >> 7) % 480


class Contents:
    """The entries of every device and host block, and the copies between them.

    Args:
        block_tokens: entries that a block holds.
    """

    def __init__(self, block_tokens):
        self.block_tokens = block_tokens
        self._blocks = {}
        self._waiting = []
        self._ruins = itertools.count(2)

    def ruin(self):
        """An entry that is nobody's."""
        return -next(self._ruins)

    def device(self, block):
        """The entries of a device block."""
        return self._block(Direction.IN, block)

    def _block(self, direction, block):
        return self._blocks.setdefault((direction, block), [_EMPTY] * self.block_tokens)

    # ---- copies -----------------------------------------------------------------------------

    def hand_over(self, transfer, *, fails):
        """A copy may start from now on; until it is carried out, what it fills is ruined."""
        if transfer.direction is Direction.IN:
            self._ruin_target(transfer)
        self._waiting.append((transfer, fails))

    def carry_out(self, transfer):
        """The copy is done now, and before it the earlier ones that share a block with it."""
        earlier = []
        for waiting in self._waiting:
            if waiting[0] is transfer:
                break
            earlier.append(waiting[0])
        else:
            return
        for other in earlier:
            if share_blocks(other, transfer):
                self.carry_out(other)
        place = next(i for i, waiting in enumerate(self._waiting) if waiting[0] is transfer)
        _, fails = self._waiting.pop(place)
        if fails:
            self._ruin_target(transfer)
            return
        out = transfer.direction is Direction.OUT
        for device, host in zip(transfer.device_blocks, transfer.host_blocks, strict=True):
            here, there = self.device(device), self._block(Direction.OUT, host)
            if out:
                there[:] = here
            else:
                here[:] = there

    def _ruin_target(self, transfer):
        out = transfer.direction is Direction.OUT
        for block in transfer.host_blocks if out else transfer.device_blocks:
            self._block(transfer.direction, block)[:] = [self.ruin()] * self.block_tokens


@dataclass
class Known:
    """What the model runner knows of a request: its tokens, their entries, its device blocks."""

    tokens: list
    prompt: int
    blocks: list
    entries: list

    def forget(self, tokens):
        """Only so many of the tokens are the request's."""
        del self.tokens[tokens:], self.entries[tokens:]


class Runner:
    """Follows the scheduler's outputs as vLLM's model runners do, and computes on `Contents`.

    Args:
        contents: of the blocks.
        overlapping: steps are scheduled before the tokens of those in flight are known.
    """

    def __init__(self, contents, *, overlapping):
        self.contents = contents
        self.overlapping = overlapping
        self.requests = {}
        self.batch = set()
        # The V2 model runner keeps the tokens of all residents, and nobody tells it again.
        self.keeps_tokens = False
        # Requests that have computed on entries which were not theirs.
        self.misled = 0

    def run(self, output):
        """Compute a step; the tokens sampled, by request: none in the middle of a prompt."""
        self._follow(output)
        sampled = {}
        for name, count in output.num_scheduled_tokens.items():
            known, start = self.requests[name], self._starts[name]
            token = self._compute(known, start, count)
            if start + count >= len(known.tokens):
                known.tokens.append(token)
                sampled[name] = [token]
            else:
                sampled[name] = []
        return sampled

    def _follow(self, output):
        for name in output.finished_req_ids:
            self.requests.pop(name, None)
            self.batch.discard(name)
        self._starts = {}
        for new in output.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            prompt = len(new.prompt_token_ids)
            self.requests[new.req_id] = Known(tokens, prompt, list(new.block_ids[0]), [])
            self._starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            self._starts[name] = cached.num_computed_tokens[i]
            self._go_on(name, cached, i)
        self.batch = set(output.num_scheduled_tokens)

    def _go_on(self, name, cached, i):
        """A request that is known already: its tokens and blocks as the scheduler sees them."""
        known, outputs = self.requests[name], cached.num_output_tokens[i]
        resumed, blocks = name in cached.resumed_req_ids, cached.new_block_ids[i]
        if not self.keeps_tokens:
            known.forget(known.prompt + outputs)
            if (resumed or name not in self.batch) and self.overlapping and outputs:
                known.forget(known.prompt)
                known.tokens += cached.all_token_ids[name][-outputs:]
        if resumed:
            known.blocks = []
        known.blocks += blocks[0] if blocks is not None else []

    def _compute(self, known, start, count):
        """Read what was computed before, write the entries of this step; the token that follows."""
        extend(known.entries, known.tokens)
        size, end = self.contents.block_tokens, start + count
        right = True
        for slot in range(-(-start // size)):
            expected = known.entries[slot * size : min((slot + 1) * size, start)]
            found = self.contents.device(known.blocks[slot])
            right = right and found[: len(expected)] == expected
        written = known.entries[start:end]
        if not right:
            self.misled += 1
            written = [self.contents.ruin()] * count
        for place, entry in zip(range(start, end), written, strict=True):
            self.contents.device(known.blocks[place // size])[place % size] = entry
        token = answer(known.entries[end - 1])
        return token if right else token + 1


def expected_answer(prompt, count):
    """The tokens that follow a prompt, where nothing goes wrong."""
    tokens, entries = list(prompt), []
    for _ in range(count):
        extend(entries, tokens)
        tokens.append(answer(entries[-1]))
    return tokens[len(prompt) :]
