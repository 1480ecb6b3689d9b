"""A device whose streams run in any order that its events allow, so that luck orders nothing."""

from collections import deque

from fastserve_vllm.kv_swap.copies import runs
from fastserve_vllm.kv_swap.streams import StreamCopies


class FakeEvent:
    """Occurs when the stream that recorded it gets there."""

    def __init__(self, device):
        self._device = device
        self.occurred = False

    def record(self, stream):
        stream.enqueue(self._occur)

    def _occur(self):
        self.occurred = True

    def query(self):
        return self.occurred

    def synchronize(self):
        while not self.occurred:
            assert self._device.run_one(), "waits for ever"

    def elapsed_time(self, end):
        assert self.occurred
        assert end.occurred
        return 1.0


class FakeStream:
    """Runs what is enqueued in order, and nothing before an event that it waits for."""

    def __init__(self):
        self.queue = deque()

    def enqueue(self, work):
        self.queue.append((None, work))

    def wait_event(self, event):
        self.queue.append((event, lambda: None))

    @property
    def ready(self):
        return bool(self.queue) and (self.queue[0][0] is None or self.queue[0][0].occurred)


class FakeDevice:
    """Stands in for `torch.cuda`; `rng` decides which of the streams that may go on does."""

    def __init__(self, rng):
        self._rng = rng
        self.compute = FakeStream()
        self._streams = [self.compute]
        outer = self

        class Stream(FakeStream):
            def __init__(self, device, priority):
                super().__init__()
                outer._streams.append(self)

            @staticmethod
            def priority_range():
                return 0, -1

        self.Stream = Stream
        self.Event = lambda *, enable_timing: FakeEvent(self)

    def current_stream(self, device):
        return self.compute

    def run_one(self):
        """Let one stream go on by one piece of work; False if none can."""
        ready = [stream for stream in self._streams if stream.ready]
        if ready:
            self._rng.choice(ready).queue.popleft()[1]()
        return bool(ready)

    def run(self, pieces):
        """Let streams go on by some work."""
        for _ in range(pieces):
            self.run_one()

    def synchronize(self):
        """Finish everything."""
        while self.run_one():
            pass


class FakeStreamCopies(StreamCopies):
    """Enqueues every region of every run apart, so that copies interleave as finely as may be."""

    def _torch_copy(self, sources, targets, stream):
        def copy(read, write):
            for source, target in zip(sources, targets, strict=True):
                for r, w, count in runs(read, write):
                    stream.enqueue(
                        lambda t=target[w : w + count], s=source[r : r + count]: t.copy_(s)
                    )

        return copy
