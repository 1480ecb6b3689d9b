"""What the swap manager copies, shares, keeps and drops, case by case."""

import pytest
from checked_manager import IN, OUT, SIZE, Manager

from fastserve_vllm.kv_swap.manager import Completion, CopyState


class TestSwapOut:
    @pytest.mark.parametrize(
        ("tokens", "copied"),
        [(0, ()), (1, (11,)), (4, (11,)), (5, (11, 12)), (8, (11, 12)), (9, (11, 12, 13))],
    )
    def test_first_copies_all_blocks_with_tokens(self, tokens, copied):
        """The partial last block is copied, blocks without tokens are not."""
        manager = Manager()
        assert manager.blocks_to_copy("a", [[11, 12, 13, 14]], tokens) == len(copied)
        transfer = manager.swap_out("a", [[11, 12, 13, 14]], tokens)
        assert transfer.device_blocks == copied
        assert len(set(transfer.host_blocks)) == len(copied)

    @pytest.mark.parametrize(
        ("first", "then", "copied"),
        [
            (8, 8, ()),
            (8, 9, (13,)),
            (6, 6, ()),
            (6, 7, (12,)),
            (6, 8, (12,)),
            (6, 13, (12, 13, 14)),
            (5, 3, ()),
        ],
    )
    def test_later_ones_copy_what_was_written_since(self, first, then, copied):
        """KV is append-only: a slot that is covered as far as wanted is left alone."""
        manager = Manager()
        manager.round_trip("a", [11, 12, 13, 14], first)
        assert manager.blocks_to_copy("a", [[11, 12, 13, 14]], then) == len(copied)
        assert manager.out("a", [11, 12, 13, 14], then).device_blocks == copied
        assert manager.tokens("a") == then

    def test_a_partial_block_is_overwritten_in_place(self):
        """The host block of a slot stays the same while the slot fills up."""
        manager = Manager()
        first = manager.out("a", [11, 12], 6)
        manager.back("a", [11, 12])
        again = manager.out("a", [11, 12], 8)
        assert again.host_blocks == first.host_blocks[1:]
        assert manager.free_blocks == 6

    def test_states(self):
        """Out and back, each over only when it was reported."""
        manager = Manager()
        states = [manager.state("a")]
        manager.swap_out("a", [[11]], 3)
        states.append(manager.state("a"))
        assert manager.land() == [Completion("a", OUT, transfer_id=0)]
        states.append(manager.state("a"))
        manager.swap_in("a", [[21]])
        states.append(manager.state("a"))
        assert manager.land() == [Completion("a", IN, transfer_id=1)]
        states.append(manager.state("a"))
        assert states == [
            None,
            CopyState.SWAPPING_OUT,
            CopyState.SWAPPED,
            CopyState.SWAPPING_IN,
            CopyState.RETAINED,
        ]

    def test_an_urgent_one_is_over_at_once(self):
        """Its success is not told."""
        manager = Manager()
        manager.swap_out("a", [[11]], 3, urgent=True)
        assert (manager.state("a"), manager.tokens("a")) == (CopyState.SWAPPED, 3)
        assert manager.in_flight == 1
        assert manager.land() == []
        assert manager.in_flight == 0

    def test_an_empty_one_is_over_at_once(self):
        """Nothing is sent."""
        manager = Manager()
        manager.round_trip("a", [11, 12], 6)
        transfer = manager.swap_out("a", [[11, 12]], 6)
        assert transfer.device_blocks == ()
        assert manager.state("a") is CopyState.SWAPPED
        assert manager.take_transfers() == ()

    def test_tokens_are_those_of_swapped_requests(self):
        """A copy on its way, or one whose request is on the device, offers nothing."""
        manager = Manager()
        tokens = [manager.tokens("a")]
        manager.swap_out("a", [[11]], 3)
        tokens.append(manager.tokens("a"))
        manager.land()
        tokens.append(manager.tokens("a"))
        manager.swap_in("a", [[21]])
        tokens.append(manager.tokens("a"))
        manager.land()
        tokens.append(manager.tokens("a"))
        assert tokens == [0, 0, 3, 0, 0]

    def test_null_blocks_hold_nothing(self):
        """They take no host block, and what became null gives its host block back."""
        manager = Manager(sizes=(SIZE, 2))
        transfer = manager.swap_out("a", [[11, 12], [0, 21, 22]], 6)
        assert transfer.device_blocks == (11, 12, 21, 22)
        manager.land()
        manager.swap_in("a", [[11, 12], [0, 21, 22]])
        manager.land()
        transfer = manager.swap_out("a", [[11, 12], [0, 0, 22, 23]], 8)
        assert transfer.device_blocks == (12, 23)
        assert manager.free_blocks == 4

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ([[11]], "1 block tables, not 2"),
            ([[11, 12], [21]], "1 blocks in group 1, not the 2 of 5 tokens"),
        ],
    )
    def test_tables_that_do_not_fit(self, blocks, message):
        """KV would be lost silently."""
        manager = Manager(sizes=(SIZE, SIZE))
        with pytest.raises(ValueError, match=message):
            manager.swap_out("a", blocks, 5)
        manager.check_integrity()

    def test_only_kv_on_the_device_leaves(self):
        """A request that is moving or away is not there."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4)
        for state in ("swapping out", "swapped", "swapping in"):
            with pytest.raises(ValueError, match=f"a cannot be swapped out: it is {state}"):
                manager.swap_out("a", [[11]], 4)
            manager.land()
            if manager.state("a") is CopyState.SWAPPED and state == "swapped":
                manager.swap_in("a", [[11]])
        assert manager.state("a") is CopyState.RETAINED


class TestRoom:
    def test_a_full_pool_declines(self):
        """Nothing changes, and it is counted."""
        manager = Manager(2)
        manager.out("a", [11, 12], 8)
        assert not manager.has_room("b", [[13]], 1)
        assert manager.swap_out("b", [[13]], 1) is None
        assert manager.state("b") is None
        assert manager.counters.no_room == 1
        assert manager.counters.outs == 1

    def test_the_least_recently_used_copy_goes_first(self):
        """Only as many as needed."""
        manager = Manager(4)
        for number, name in enumerate("abc"):
            manager.round_trip(name, [11 + number], 4)
        manager.out("a", [11], 4)
        manager.back("a", [11])
        assert (manager.free_blocks, manager.reclaimable_blocks) == (1, 3)
        manager.swap_out("d", [[21, 22]], 8)
        states = {name: manager.state(name) for name in "abc"}
        retained = CopyState.RETAINED
        assert states == {"a": retained, "b": None, "c": retained}
        assert manager.counters.reclaimed_copies == 1

    def test_swapped_copies_are_never_reclaimed(self):
        """They are all there is."""
        manager = Manager(3)
        manager.out("a", [11, 12], 8)
        manager.round_trip("b", [13], 4)
        assert manager.has_room("c", [[21]], 4)
        assert not manager.has_room("c", [[21, 22]], 8)

    def test_its_own_copy_is_not_reclaimed(self):
        """It is what makes the next swap-out cheap."""
        manager = Manager(3)
        manager.round_trip("a", [11, 12], 8)
        assert manager.has_room("a", [[11, 12, 13]], 12)
        assert not manager.has_room("a", [[11, 12, 13, 14]], 16)
        assert manager.swap_out("a", [[11, 12, 13, 14]], 16) is None
        assert manager.state("a") is CopyState.RETAINED
        assert manager.out("a", [11, 12, 13], 12).device_blocks == (13,)

    def test_what_a_slot_gives_back_counts_as_room(self):
        """A window moves on in a pool that is full."""
        manager = Manager(2)
        manager.round_trip("a", [11, 12], 8)
        assert manager.out("a", [0, 12, 13], 12).device_blocks == (13,)

    def test_a_copy_in_flight_is_not_reclaimed(self):
        """An urgent swap-in still reads it."""
        manager = Manager(1)
        manager.out("a", [11], 4)
        transfer = manager.swap_in("a", [[12]], urgent=True)
        manager.take_transfers()
        assert manager.state("a") is CopyState.RETAINED
        assert not manager.has_room("b", [[13]], 4)
        manager.land(transfer)
        assert manager.has_room("b", [[13]], 4)

    def test_blocks_that_a_swapped_copy_shares_are_no_room(self):
        """Dropping the retained copy frees only what it has alone."""
        manager = Manager(3)
        manager.round_trip("a", [11, 12], 8, ["x", "y"])
        manager.out("b", [11, 13], 8, ["x"])
        assert (manager.free_blocks, manager.reclaimable_blocks) == (0, 1)
        assert not manager.has_room("c", [[21, 22]], 8)
        manager.out("c", [21], 4)
        assert manager.state("a") is None
        assert manager.back("b", [31, 32]).device_blocks == (31, 32)

    def test_blocks_that_retained_copies_share_are_room_once(self):
        """Both have to be dropped."""
        manager = Manager(1)
        manager.round_trip("a", [11], 4, ["x"])
        manager.round_trip("b", [12], 4, ["x"])
        assert manager.reclaimable_blocks == 1
        manager.out("c", [13], 4)
        assert manager.counters.reclaimed_copies == 2

    def test_content_about_to_be_shared_is_not_reclaimed(self):
        """The copy that has it may go, its block stays."""
        manager = Manager(2)
        manager.round_trip("a", [11, 12], 8, ["x", "y"])
        assert not manager.has_room("b", [[21, 22, 23]], 12, keys=[["x"]])
        transfer = manager.swap_out("b", [[21, 22]], 8, keys=[["x"]])
        assert transfer.device_blocks == (22,)
        assert manager.state("a") is None


class TestSharing:
    def test_known_content_is_not_copied_again(self):
        """Full blocks with the same key are one host block."""
        manager = Manager()
        manager.out("a", [11, 12], 7, ["x"])
        assert manager.out("b", [21, 22], 8, ["x", "z"]).device_blocks == (22,)
        assert manager.free_blocks == 5
        assert manager.counters.blocks_shared == 1

    @pytest.mark.parametrize("urgent", [False, True])
    def test_content_in_flight_is_not_shared(self, urgent):
        """It might fail yet."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4, keys=[["x"]], urgent=urgent)
        assert manager.blocks_to_copy("b", [[21]], 4, keys=[["x"]]) == 1
        manager.land()
        assert manager.blocks_to_copy("b", [[21]], 4, keys=[["x"]]) == 0

    def test_content_that_failed_is_not_shared(self):
        """The key was never known."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4, keys=[["x"]])
        manager.land(cause="broken")
        assert manager.blocks_to_copy("b", [[21]], 4, keys=[["x"]]) == 1

    def test_content_of_an_aborted_request_is_not_shared(self):
        """Its host block is free when the copy has landed."""
        manager = Manager()
        manager.swap_out("a", [[11]], 4, keys=[["x"]])
        (transfer,) = manager.take_transfers()
        manager.discard("a")
        manager.land(transfer)
        assert manager.blocks_to_copy("b", [[21]], 4, keys=[["x"]]) == 1
        assert manager.free_blocks == 8

    def test_a_partial_block_has_no_known_content(self):
        """Keys beyond the full blocks are ignored."""
        manager = Manager()
        manager.out("a", [11, 12], 7, ["x", "y"])
        assert manager.blocks_to_copy("b", [[21, 22]], 8, keys=[["x", "y"]]) == 1

    def test_keys_belong_to_their_group(self):
        """The same tokens have other KV in another group."""
        manager = Manager(sizes=(SIZE, SIZE))
        manager.swap_out("a", [[11], [0]], 4, keys=[["x"], ["x"]])
        manager.land()
        assert manager.blocks_to_copy("b", [[21], [22]], 4, keys=[["x"], ["x"]]) == 1

    def test_shared_blocks_live_as_long_as_their_last_holder(self):
        """And so does the key."""
        manager = Manager()
        manager.out("a", [11], 4, ["x"])
        manager.out("b", [21], 4, ["x"])
        manager.discard("a")
        assert manager.blocks_to_copy("c", [[31]], 4, keys=[["x"]]) == 0
        manager.discard("b")
        assert manager.free_blocks == 8
        assert manager.blocks_to_copy("c", [[31]], 4, keys=[["x"]]) == 1

    def test_a_slot_that_fills_up_may_turn_out_to_be_known(self):
        """Its own partial block is given back."""
        manager = Manager()
        manager.out("a", [11], 4, ["x"])
        manager.round_trip("b", [21], 3)
        assert manager.out("b", [21], 4, ["x"]).device_blocks == ()
        assert manager.free_blocks == 7

    def test_known_content_is_never_overwritten(self):
        """A slot whose tokens were rejected and computed again goes to a block of its own."""
        manager = Manager()
        first = manager.out("a", [11], 4, ["x"])
        manager.out("b", [21], 4, ["x"])
        manager.back("a", [11], tokens=2)
        again = manager.out("a", [11], 4, ["y"])
        assert again.device_blocks == (11,)
        assert again.host_blocks != first.host_blocks
        assert manager.swap_in("b", [[22]]).host_blocks == first.host_blocks


class TestSwapIn:
    def test_brings_every_block_to_its_slot(self):
        """Pairs follow the tables."""
        manager = Manager()
        out = manager.out("a", [11, 12, 13], 10)
        transfer = manager.swap_in("a", [[21, 22, 23, 24]])
        assert transfer.device_blocks == (21, 22, 23)
        assert transfer.host_blocks == out.host_blocks

    @pytest.mark.parametrize(
        ("first_token", "copied"),
        [(0, (21, 22, 23)), (4, (22, 23)), (8, (23,)), (10, ()), (12, ())],
    )
    def test_leaves_the_cached_prefix_alone(self, first_token, copied):
        """Blocks before `first_token` belong to others too."""
        manager = Manager()
        manager.out("a", [11, 12, 13], 10)
        transfer = manager.swap_in("a", [[21, 22, 23]], first_token=first_token)
        assert transfer.device_blocks == copied
        moving = manager.state("a") is CopyState.SWAPPING_IN
        assert moving == bool(copied)

    def test_a_boundary_inside_a_block(self):
        """Half a block cannot be copied."""
        manager = Manager()
        manager.out("a", [11, 12], 8)
        with pytest.raises(ValueError, match="first_token 3 is inside a block of group 0"):
            manager.swap_in("a", [[21, 22]], first_token=3)

    def test_a_block_that_nothing_fills(self):
        """What was null when it left cannot come back."""
        manager = Manager()
        manager.out("a", [0, 12, 13], 12)
        with pytest.raises(ValueError, match="a: the host has no KV for group 0, slot 0"):
            manager.swap_in("a", [[21, 22, 23]])
        assert manager.state("a") is CopyState.SWAPPED
        transfer = manager.swap_in("a", [[21, 0, 23]], first_token=4)
        assert transfer.device_blocks == (23,)

    def test_a_block_that_the_cache_had(self):
        """A slot that comes from the prefix cache is new to the host."""
        manager = Manager()
        manager.out("a", [0, 12], 8)
        manager.back("a", [21, 22], first_token=4)
        assert manager.out("a", [21, 22], 8).device_blocks == (21,)

    def test_only_swapped_requests_come_back(self):
        """One that never left has nothing to come back with."""
        manager = Manager()
        with pytest.raises(ValueError, match="a cannot be swapped in: nothing of it"):
            manager.swap_in("a", [[21]])
        manager.swap_out("a", [[11]], 4)
        with pytest.raises(ValueError, match="a cannot be swapped in: it is swapping out"):
            manager.swap_in("a", [[21]])

    def test_tables_that_do_not_fit(self):
        """The request would miss KV."""
        manager = Manager()
        manager.out("a", [11, 12], 8)
        with pytest.raises(ValueError, match="1 blocks in group 0, not the 2 of 8 tokens"):
            manager.swap_in("a", [[21]])

    def test_rejected_tokens_are_forgotten(self):
        """Fewer tokens come back than left, and what follows is copied again."""
        manager = Manager()
        manager.out("a", [11, 12, 13], 9)
        assert manager.back("a", [21, 22], tokens=6).device_blocks == (21, 22)
        assert manager.free_blocks == 6
        assert manager.out("a", [21, 22, 23], 9).device_blocks == (22, 23)

    def test_more_tokens_than_there_are(self):
        """The prefix cache may have more than the copy."""
        manager = Manager()
        manager.out("a", [11], 3)
        assert manager.swap_in("a", [[21, 22]], 8, first_token=8).device_blocks == ()


class TestSave:
    def test_the_request_goes_on(self):
        """Full blocks are copied in advance; leaving then costs the rest."""
        manager = Manager()
        assert manager.save("a", [[11, 12, 13]], 8).device_blocks == (11, 12)
        assert manager.state("a") is CopyState.SAVING
        assert (manager.tokens("a"), manager.retained_tokens("a")) == (0, 8)
        assert manager.land() == [Completion("a", OUT, transfer_id=0)]
        assert manager.state("a") is CopyState.RETAINED
        assert manager.save("a", [[11, 12, 13]], 8) is None
        assert manager.swap_out("a", [[11, 12, 13]], 9).device_blocks == (13,)
        counters = manager.counters
        assert (counters.first_out_blocks, counters.first_out_copied) == (3, 3)
        assert (counters.saves, counters.blocks_kept) == (1, 2)

    def test_a_request_that_is_saved_cannot_leave(self):
        """There is no room for it, so to say."""
        manager = Manager()
        manager.save("a", [[11]], 4)
        assert not manager.has_room("a", [[11]], 4)
        with pytest.raises(ValueError, match="a cannot be swapped out: it is saving"):
            manager.swap_out("a", [[11]], 4)

    def test_blocks_given_up_meanwhile(self):
        """Invalidated, it may read what others write; its host blocks stay fenced."""
        manager = Manager(2)
        manager.out("b", [21], 4)
        manager.save("a", [[11]], 4, keys=[["x"]])
        manager.take_transfers()
        manager.invalidate("a")
        back = manager.swap_in("b", [[11]])
        assert not manager.has_room("c", [[31]], 4, keys=[["x"]])
        manager.take_transfers()
        (save,) = [f.transfer for f in manager._in_flight if f.transfer != back]
        assert manager.land(save) == [Completion("a", OUT, "invalidated", transfer_id=1)]
        assert manager.blocks_to_copy("c", [[31]], 4, keys=[["x"]]) == 1

    def test_a_save_that_failed(self):
        """The request has its KV, and no copy."""
        manager = Manager()
        manager.save("a", [[11]], 4)
        assert manager.land(cause="broken") == [Completion("a", OUT, "broken", transfer_id=0)]
        assert (manager.state("a"), manager.free_blocks) == (None, 8)

    def test_an_abort_while_it_is_saved(self):
        """The device blocks are needed until the copy has landed."""
        manager = Manager()
        save = manager.save("a", [[11]], 4)
        manager.take_transfers()
        assert manager.discard("a") is OUT
        completion = Completion("a", OUT, discarded=True, transfer_id=0)
        assert manager.land(save) == [completion]

    def test_known_content_is_not_saved_again(self):
        """An empty one is over at once."""
        manager = Manager()
        manager.out("a", [11], 4, ["x"])
        assert manager.save("b", [[21]], 4, keys=[["x"]]).device_blocks == ()
        assert manager.state("b") is CopyState.RETAINED
        assert manager.take_transfers() == ()

    def test_not_before_a_swap_in_was_handed_over(self):
        """The swap-in would be withdrawn under a request that goes on."""
        manager = Manager()
        manager.out("a", [11], 3)
        manager.swap_in("a", [[21]], urgent=True)
        assert manager.save("a", [[21]], 4) is None
        assert len(manager.take_transfers()) == 1
