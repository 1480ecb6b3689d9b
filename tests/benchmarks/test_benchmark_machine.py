"""What the machine did beside a measurement."""

import time

from benchmarks.machine import SpeedProbe


def test_the_probe_counts_processor_time_of_a_loop_that_is_always_the_same():
    """Its figure is some microseconds, however long the measurement is, and is there at once."""
    with SpeedProbe() as short:
        pass
    with SpeedProbe() as probe:
        time.sleep(0.6)
    for figures in (short.figures(), probe.figures()):
        assert 1.0 < figures["loop_us"] < 10_000.0
