"""What the swap manager makes of reports, failures, aborts and everything that overtakes them."""

import pytest
from checked_manager import IN, OUT, SIZE, Manager

from fastserve_vllm.kv_swap.manager import Completion, CopyState, SwapManager
from fastserve_vllm.kv_swap.transfers import Direction, Report


class TestReports:
    def test_every_worker_has_to_report(self):
        """A copy is as good as its slowest worker."""
        manager = Manager(workers=3)
        manager.swap_out("a", [[11]], 4)
        manager.take_transfers()
        assert manager.report(Report({0: 1})) == []
        assert manager.report(Report({0: 1})) == []
        assert manager.state("a") is CopyState.SWAPPING_OUT
        assert manager.report(Report({0: 1})) == [Completion("a", OUT, transfer_id=0)]

    @pytest.mark.parametrize("failed", [0, 1, 2])
    def test_one_worker_fails_all(self, failed):
        """Whoever it is; the others' copies are waited for."""
        manager = Manager(workers=3)
        manager.swap_out("a", [[11]], 4)
        manager.take_transfers()
        completions = []
        for worker in range(3):
            causes = {0: "broken"} if worker == failed else {}
            completions += manager.report(Report({0: 1}, causes))
            assert bool(completions) == (worker == 2)
        assert completions == [Completion("a", OUT, "broken", transfer_id=0)]
        assert manager.free_blocks == 8

    @pytest.mark.parametrize(
        ("report", "message"),
        [
            (Report({7: 1}), "transfer 7 is not in flight"),
            (Report({}, {7: "broken"}), "transfer 7 is not in flight"),
            (Report({0: 2}), "transfer 0: more reports than workers"),
        ],
    )
    def test_a_report_that_cannot_be(self, report, message):
        """Nothing is taken in of it."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4)
        manager.take_transfers()
        with pytest.raises(ValueError, match=message):
            manager.report(report)
        assert manager.land(*[f.transfer for f in manager._in_flight])

    def test_a_transfer_that_was_not_handed_over(self):
        """Nobody can have done it."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4)
        with pytest.raises(ValueError, match="transfer 0 is not in flight"):
            manager.report(Report({0: 1}))

    def test_transfers_are_handed_over_once_and_in_order(self):
        """Their ids rise."""
        manager = Manager()
        for number, name in enumerate("abc"):
            manager.swap_out(name, [[11 + number]], 4, urgent=name == "b")
        assert [t.device_blocks for t in manager.take_transfers()] == [(11,), (12,), (13,)]
        assert manager.take_transfers() == ()

    def test_merged_reports(self):
        """What several workers did, in one report."""
        one = Report({1: 1, 2: 1}, {2: "x"}, {"out": 10}, {"out": 0.5}, 0.25)
        two = Report({2: 1}, {}, {"out": 10, "in": 5}, {"in": 0.25}, 0.5)
        copy_s = {"out": 0.5, "in": 0.25}
        merged = Report({1: 1, 2: 2}, {2: "x"}, {"out": 20, "in": 5}, copy_s, 0.5)
        assert one.merge(two) == merged
        assert two.merge(one) == merged


class TestFailures:
    def test_a_failed_swap_out(self):
        """The KV is still on the device, the whole copy is gone."""
        manager = Manager()
        manager.round_trip("a", [11], 4)
        manager.swap_out("a", [[11, 12]], 8)
        assert manager.land(cause="broken") == [Completion("a", OUT, "broken", transfer_id=2)]
        assert manager.state("a") is None
        assert manager.free_blocks == 8
        assert manager.counters.failed == 1

    def test_a_failed_swap_in(self):
        """The request has to recompute."""
        manager = Manager()
        manager.out("a", [11], 4)
        manager.swap_in("a", [[21]])
        completion = Completion("a", IN, "broken", lost=True, transfer_id=1)
        assert manager.land(cause="broken") == [completion]
        assert manager.state("a") is None
        assert manager.free_blocks == 8

    @pytest.mark.parametrize("direction", Direction)
    def test_a_failed_urgent_one(self, direction):
        """It is told, unlike one that worked."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4, urgent=True)
        if direction is IN:
            manager.land()
            manager.swap_in("a", [[21]], urgent=True)
        (completion,) = manager.land(cause="broken")
        assert (completion.direction, completion.cause) == (direction, "broken")
        assert completion.lost
        assert manager.state("a") is None

    def test_an_urgent_swap_out_fails_after_the_request_went_back(self):
        """The swap-in read what is not there: it fails, once, when it has landed."""
        manager = Manager()
        out = manager.swap_out("a", [[11]], 4, urgent=True)
        back = manager.swap_in("a", [[21]])
        assert manager.take_transfers() == (out, back)
        assert manager.land(out, cause="broken") == []
        assert manager.state("a") is CopyState.SWAPPING_IN
        completion = Completion("a", IN, "broken", lost=True, transfer_id=1)
        assert manager.land(back) == [completion]
        assert manager.free_blocks == 8

    def test_a_swap_in_waits_for_what_it_read(self):
        """Whatever the order of the reports."""
        manager = Manager()
        out = manager.swap_out("a", [[11]], 4, urgent=True)
        back = manager.swap_in("a", [[21]])
        manager.take_transfers()
        assert manager.land(back) == []
        assert manager.state("a") is CopyState.SWAPPING_IN
        assert manager.land(out) == [Completion("a", IN, transfer_id=1)]

    def test_an_urgent_swap_out_fails_under_a_resident(self):
        """An urgent swap-in has brought garbage: the request hears of it at once, and once."""
        manager = Manager()
        out = manager.swap_out("a", [[11]], 4, urgent=True)
        back = manager.swap_in("a", [[21]], urgent=True)
        manager.take_transfers()
        completion = Completion("a", OUT, "broken", lost=True, transfer_id=0)
        assert manager.land(out, cause="broken") == [completion]
        assert manager.land(back, cause="too") == []

    def test_content_computed_on_garbage_is_not_shared(self):
        """A later swap-out settles after the urgent swap-in that it depends on."""
        manager = Manager()
        manager.out("a", [11], 4)
        back = manager.swap_in("a", [[21]], urgent=True)
        manager.take_transfers()
        again = manager.swap_out("a", [[21, 22]], 8, keys=[["x", "y"]])
        manager.take_transfers()
        assert manager.land(again) == []
        completion = Completion("a", OUT, "broken", lost=True, transfer_id=2)
        assert manager.land(back, cause="broken") == [completion]
        assert manager.blocks_to_copy("b", [[31, 32]], 8, keys=[["x", "y"]]) == 2


class TestAborts:
    @pytest.mark.parametrize("direction", Direction)
    def test_during_a_copy(self, direction):
        """The device blocks are needed until it has landed, and so are the host's."""
        manager = Manager(1)
        manager.swap_out("a", [[11]], 4)
        if direction is IN:
            manager.land()
            manager.swap_in("a", [[21]])
        (transfer,) = manager.take_transfers()
        assert manager.discard("a") is direction
        assert manager.state("a") is None
        assert not manager.has_room("b", [[31]], 4)
        (completion,) = manager.land(transfer)
        assert (completion.request_id, completion.discarded) == ("a", True)
        assert manager.has_room("b", [[31]], 4)

    def test_of_a_copy_that_fails(self):
        """The cause is passed on, the consequence is the same."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4)
        manager.take_transfers()
        manager.discard("a")
        transfers = [flight.transfer for flight in manager._in_flight]
        completion = Completion("a", OUT, "broken", discarded=True, transfer_id=0)
        assert manager.land(*transfers, cause="broken") == [completion]

    @pytest.mark.parametrize("urgent", [False, True])
    def test_before_it_is_handed_over(self, urgent):
        """It never is."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4, urgent=urgent)
        assert manager.discard("a") is None
        assert manager.take_transfers() == ()
        assert (manager.in_flight, manager.free_blocks) == (0, 8)

    def test_with_an_urgent_copy_in_flight(self):
        """Nobody waits for it but its host blocks."""
        manager = Manager(1)
        out = manager.swap_out("a", [[11]], 4, urgent=True)
        manager.take_transfers()
        assert manager.discard("a") is None
        assert not manager.has_room("b", [[31]], 4)
        assert manager.land(out, cause="broken") == []
        assert manager.has_room("b", [[31]], 4)

    def test_a_request_with_the_same_id(self):
        """The old transfer does not touch it, and is told apart."""
        manager = Manager()
        old = manager.swap_out("a", [[11]], 4, keys=[["x"]])
        manager.take_transfers()
        manager.discard("a")
        new = manager.swap_out("a", [[12]], 3)
        manager.take_transfers()
        assert not set(old.host_blocks) & set(new.host_blocks)
        assert manager.land(new) == [Completion("a", OUT, transfer_id=1)]
        gone = Completion("a", OUT, "broken", discarded=True, transfer_id=0)
        assert manager.land(old, cause="broken") == [gone]
        assert manager.tokens("a") == 3

    def test_without_a_copy(self):
        """Nothing to do."""
        assert Manager().discard("a") is None

    def test_nothing_is_kept(self):
        """A request that is gone leaves no trace."""
        manager = Manager()
        manager.round_trip("a", [11, 12], 6, ["x"])
        manager.out("b", [11, 13], 6, ["x"])
        manager.discard("a")
        manager.discard("b")
        assert manager.free_blocks == 8
        assert not manager._returning
        assert not list(manager._copies)
        assert not manager._pool._by_key


class TestRaces:
    def test_a_swap_out_before_the_swap_in_was_handed_over(self):
        """The swap-in is withdrawn: its device blocks have new owners in the same step."""
        manager = Manager()
        manager.out("a", [11], 4)
        manager.swap_in("a", [[21]], urgent=True)
        assert manager.swap_out("a", [[21]], 4, urgent=True).device_blocks == ()
        assert manager.take_transfers() == ()
        assert manager.tokens("a") == 4

    def test_a_withdrawn_swap_in_brought_nothing(self):
        """Where the swap-out that overtook it fails, the device has nothing."""
        manager = Manager()
        manager.out("a", [0, 12], 8)
        manager.swap_in("a", [[21, 22]], first_token=4, urgent=True)
        assert manager.swap_out("a", [[21, 22]], 8).device_blocks == (21,)
        (completion,) = manager.land(cause="broken")
        assert completion.lost

    def test_a_swap_out_right_after_an_urgent_swap_in(self):
        """The partial block is overwritten although the swap-in has not been reported."""
        manager = Manager()
        out = manager.out("a", [11], 2)
        back = manager.swap_in("a", [[21]], urgent=True)
        manager.take_transfers()
        again = manager.swap_out("a", [[21]], 3, urgent=True)
        assert again.host_blocks == out.host_blocks
        assert manager.take_transfers() == (again,)
        assert manager.land(again) == []
        assert manager.land(back) == []
        assert manager.free_blocks == 7

    def test_an_older_transfer_does_not_name_what_a_newer_one_brings(self):
        """A block copied again after a rejection has the newer content."""
        manager = Manager()
        first = manager.swap_out("a", [[11]], 4, keys=[["x"]], urgent=True)
        manager.swap_in("a", [[21]], 2, urgent=True)
        manager.take_transfers()
        again = manager.swap_out("a", [[21]], 4, keys=[["y"]], urgent=True)
        assert again.host_blocks == first.host_blocks
        transfers = [flight.transfer for flight in manager._in_flight]
        manager.take_transfers()
        manager.land(*transfers)
        assert manager.blocks_to_copy("b", [[31]], 4, keys=[["x"]]) == 1
        assert manager.blocks_to_copy("b", [[31]], 4, keys=[["y"]]) == 0

    def test_a_failure_withdraws_the_swap_in_that_followed(self):
        """It would write to device blocks that the request is about to give up."""
        manager = Manager()
        out = manager.swap_out("a", [[11]], 4, urgent=True)
        manager.take_transfers()
        manager.swap_in("a", [[21]], urgent=True)
        assert [c.lost for c in manager.land(out, cause="broken")] == [True]
        assert manager.take_transfers() == ()
        assert manager.free_blocks == 8


class TestInvalidate:
    @pytest.mark.parametrize("everything", [False, True])
    @pytest.mark.parametrize("direction", Direction)
    def test_in_flight(self, direction, everything):
        """Its completion carries a cause, and its blocks stay fenced until then."""
        manager = Manager(1)
        manager.swap_out("a", [[11]], 4)
        if direction is IN:
            manager.land()
            manager.swap_in("a", [[21]])
        manager.invalidate_all() if everything else manager.invalidate("a")
        manager.check_integrity()
        assert not manager.has_room("b", [[31]], 4)
        lost = direction is IN
        number = int(lost)
        completion = Completion("a", direction, "invalidated", lost=lost, transfer_id=number)
        assert manager.land() == [completion]
        assert manager.state("a") is None
        assert manager.free_blocks == 1

    @pytest.mark.parametrize("everything", [False, True])
    def test_at_rest(self, everything):
        """It is gone at once."""
        manager = Manager()
        manager.out("a", [11], 4)
        manager.invalidate_all() if everything else manager.invalidate("a")
        assert (manager.state("a"), manager.tokens("a")) == (None, 0)
        assert manager.free_blocks == 8

    def test_an_urgent_copy_in_flight(self):
        """The request recomputes anyway, so a failure is not told."""
        manager = Manager(1)
        out = manager.swap_out("a", [[11]], 4, urgent=True)
        manager.take_transfers()
        manager.invalidate("a")
        assert manager.state("a") is None
        assert manager.free_blocks == 0
        assert manager.land(out, cause="broken") == []
        assert manager.free_blocks == 1

    def test_a_newer_copy_is_not_harmed_by_an_older_transfer(self):
        """Transfers belong to copies, not to ids."""
        manager = Manager()
        old = manager.swap_out("a", [[11]], 4, urgent=True)
        manager.take_transfers()
        manager.invalidate("a")
        new = manager.swap_out("a", [[21]], 4)
        manager.take_transfers()
        assert manager.land(old, cause="broken") == []
        assert manager.land(new) == [Completion("a", OUT, transfer_id=1)]

    def test_others_keep_what_they_share(self):
        """The content of a block does not depend on who brought it."""
        manager = Manager()
        manager.out("a", [11], 4, ["x"])
        manager.out("b", [21], 4, ["x"])
        manager.invalidate("a")
        assert manager.back("b", [31]).device_blocks == (31,)

    def test_all_forgets_the_content(self):
        """New weights make other KV of the same tokens, also from copies in flight."""
        manager = Manager()
        manager.out("a", [11], 4, ["x"])
        manager.swap_out("b", [[12]], 4, keys=[["y"]])
        manager.invalidate_all()
        manager.land()
        assert manager.blocks_to_copy("c", [[21, 22]], 8, keys=[["x", "y"]]) == 2

    def test_all_forgets_content_that_is_being_read(self):
        """The block is still held, but by nobody who could share it."""
        manager = Manager()
        manager.out("a", [11], 4, ["x"])
        manager.swap_in("a", [[21]])
        manager.invalidate_all()
        assert manager.blocks_to_copy("b", [[31]], 4, keys=[["x"]]) == 1

    @pytest.mark.parametrize("gone", [False, True])
    def test_content_that_lands_too_late_is_not_known(self, gone):
        """Not even while a swap-in still reads it."""
        manager = Manager()
        out = manager.swap_out("a", [[11]], 4, keys=[["x"]], urgent=True)
        manager.swap_in("a", [[21]], urgent=True)
        manager.take_transfers()
        manager.discard("a") if gone else manager.invalidate_all()
        manager.land(out)
        assert manager.in_flight == 1
        assert manager.blocks_to_copy("b", [[31]], 4, keys=[["x"]]) == 1

    def test_all_leaves_residents_their_warning(self):
        """One that goes on with its KV hears that an urgent swap-in has failed."""
        manager = Manager()
        manager.out("a", [11], 4)
        back = manager.swap_in("a", [[21]], urgent=True)
        manager.take_transfers()
        manager.invalidate_all()
        assert manager.blocks_to_copy("a", [[21]], 4) == 1
        manager.swap_out("a", [[21]], 4)
        assert manager.land(back, cause="broken") == []
        (completion,) = manager.land()
        assert (completion.cause, completion.lost) == ("broken", True)

    def test_all_before_a_swap_in_was_handed_over(self):
        """The KV is nowhere: the request cannot be swapped out in the same step."""
        manager = Manager()
        manager.out("a", [11], 4)
        manager.swap_in("a", [[21]], urgent=True)
        manager.invalidate_all()
        assert manager.swap_out("a", [[21]], 4, urgent=True) is None


class TestCounters:
    def test_second_swap_outs_copy_less(self):
        """First and later ones are told apart, by request."""
        manager = Manager()
        manager.round_trip("a", [11, 12], 8)
        manager.out("a", [11, 12, 13], 9)
        manager.out("b", [21], 4)
        counters = manager.counters
        assert (counters.first_out_blocks, counters.first_out_copied) == (3, 3)
        assert (counters.again_out_blocks, counters.again_out_copied) == (3, 1)
        assert counters.blocks_kept == 2

    def test_a_reclaimed_copy_counts_as_again(self):
        """The request pays for the second time."""
        manager = Manager(1)
        manager.round_trip("a", [11], 4)
        manager.round_trip("b", [12], 4)
        manager.out("a", [11], 4)
        assert manager.counters.again_out_copied == 1
        assert manager.counters.reclaimed_copies == 2

    def test_transfers(self):
        """Swaps as they are begun, blocks as they are handed over."""
        manager = Manager()
        manager.round_trip("a", [11, 12], 8)
        manager.swap_out("b", [[13]], 4, urgent=True)
        counters = manager.counters
        assert (counters.outs, counters.ins, counters.urgent_outs) == (2, 1, 1)
        assert (counters.blocks_out, counters.blocks_in) == (2, 2)
        manager.take_transfers()
        assert counters.blocks_out == 3


class TestIntegrity:
    @pytest.mark.parametrize(
        ("damage", "law"),
        [
            (lambda m: m._pool._free.append(0), "I4: host block 0 is free xor held"),
            (lambda m: m._pool._holders.__setitem__(0, 2), "I4: host block 0 miscounts"),
            (lambda m: m._pool._idle.__setitem__(0, 1), "I4: host block 0: idle holders"),
            (lambda m: setattr(m._pool, "num_reclaimable", 1), "I4: reclaimable"),
            (lambda m: m._pool._by_key.clear(), "I4: content keys"),
            (lambda m: m._copies.get("a").flights.clear(), "I1: .* has no copy"),
            (lambda m: m._copies.get("a").__setattr__("state", CopyState.SWAPPED), "I1: the copy"),
            (lambda m: m._copies.get("b").__setattr__("state", CopyState.RETAINED), "I1: the copy"),
        ],
    )
    def test_damage_is_noticed(self, damage, law):
        """Every law can fail."""
        manager = Manager()
        manager.out("b", [11], 4, ["x"])
        manager.swap_out("a", [[11, 12]], 8)
        manager.check_integrity()
        damage(manager)
        with pytest.raises(AssertionError, match=law):
            manager.check_integrity()

    def test_two_swap_ins_to_one_device_block(self):
        """Law I5: the later would overwrite the earlier."""
        manager = SwapManager(8, [SIZE])
        for name in "ab":
            manager.swap_out(name, [[11]], 4, urgent=True)
        manager.report(Report(dict.fromkeys([t.transfer_id for t in manager.take_transfers()], 1)))
        manager.swap_in("a", [[21]])
        manager.swap_in("b", [[21]])
        with pytest.raises(AssertionError, match=r"I5: .* touches what a transfer in writes"):
            manager.check_integrity()

    def test_a_swap_in_to_what_is_still_copied_out(self):
        """Law I5: device blocks stay until every worker has reported."""
        manager = SwapManager(8, [SIZE])
        manager.swap_out("a", [[11]], 4, urgent=True)
        manager.swap_out("b", [[12]], 4)
        manager.swap_in("a", [[12]])
        with pytest.raises(AssertionError, match=r"I5: .* writes what a transfer out reads"):
            manager.check_integrity()
