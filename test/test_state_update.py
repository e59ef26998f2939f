"""The update of the compressed state: what is kept, what is moved, and that keys, values and ordinals stay together."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statekv_ros.kernels.state_update import update_state

IMPLEMENTATIONS = ('slots', 'naive')
HEAD_DIM = 3


class State:
    """Buffers as the memory engine holds them; rows tell their token's ordinal, keys and values apart."""

    def __init__(self, layers: int, kv_heads: int, capacity: int, device: str = 'cpu'):
        # NaN and -1: a slot that was never used shows when it is kept.
        self.key = torch.full((layers, kv_heads, capacity, HEAD_DIM), torch.nan, device=device)
        self.value = self.key.clone()
        self.ordinal = torch.full((layers, kv_heads, capacity), -1, device=device)
        self.importance = torch.full((layers, kv_heads, capacity), torch.nan, device=device)
        self.beside = torch.full((2, layers, kv_heads, capacity), -1, device=device)
        self.live, self.seen = 0, 0

    def write_frame(self, tokens: int, importance: torch.Tensor) -> None:
        """Put a frame behind the state; `importance` [layers, kv_heads, live + tokens] is of state and frame together."""
        frame = torch.arange(self.seen, self.seen + tokens, device=self.key.device)
        slots = slice(self.live, self.live + tokens)
        self.ordinal[..., slots] = frame
        self.key[..., slots, :], self.value[..., slots, :] = frame[:, None].float(), -frame[:, None].float()
        self.importance[..., :importance.shape[-1]] = importance
        self.beside[..., slots] = torch.stack([frame, 2 * frame])[:, None, None]
        self.live, self.seen = self.live + tokens, self.seen + tokens

    def update(self, budget: int, implementation: str = 'slots') -> None:
        self.live = update_state(self.key, self.value, self.ordinal, self.importance, self.live, budget, implementation,
                                 self.beside)

    def kept(self) -> torch.Tensor:
        """Ordinals of the carried tokens, sorted: [layers, kv_heads, live]."""
        return self.ordinal[..., :self.live].sort(-1).values


def importances(generator: torch.Generator, shape: tuple[int, ...], ties: bool) -> torch.Tensor:
    if ties:  # few values, zero among them
        return torch.randint(0, 3, shape, generator=generator).float() / 4
    return torch.rand(shape, generator=generator)


def ordered_gather(ordinals: list[int], importance: list[float], budget: int) -> list[int]:
    """The definition for one head: the most important first, the earlier of two equals first, the budget cuts."""
    ranked = sorted(zip(ordinals, importance), key=lambda token: (-token[1], token[0]))
    return sorted(ordinal for ordinal, _ in ranked[:budget])


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 3), kv_heads=st.integers(1, 3), budget=st.integers(1, 24), largest_frame=st.integers(1, 32),
       ties=st.booleans(), seed=st.integers(0, 2**31))
def test_kept_sets_equal_an_ordered_gather_over_100_steps(implementation, layers, kv_heads, budget, largest_frame, ties,
                                                          seed):
    generator = torch.Generator().manual_seed(seed)
    state = State(layers, kv_heads, budget + largest_frame)
    expected = [[[] for _ in range(kv_heads)] for _ in range(layers)]
    for _ in range(100):
        tokens = int(torch.randint(1, largest_frame + 1, (), generator=generator))
        first = state.seen
        # The engine holds importance by slot, the definition by token: look it up by the ordinal that the slot holds.
        importance = importances(generator, (layers, kv_heads, state.live + tokens), ties)
        state.write_frame(tokens, importance)
        by_token = [[dict(zip(state.ordinal[layer, head, :state.live].tolist(), importance[layer, head].tolist()))
                     for head in range(kv_heads)] for layer in range(layers)]
        state.update(budget, implementation)
        for layer in range(layers):
            for head in range(kv_heads):
                held = expected[layer][head] + list(range(first, first + tokens))
                mass = by_token[layer][head]
                assert sorted(mass) == held
                expected[layer][head] = ordered_gather(held, [mass[ordinal] for ordinal in held], budget)
        assert state.live == min(budget, state.seen)
        assert state.kept().tolist() == expected
        kept = state.ordinal[..., :state.live, None].float().expand(-1, -1, -1, HEAD_DIM)
        assert torch.equal(state.key[..., :state.live, :], kept) and torch.equal(state.value[..., :state.live, :], -kept)
        ordinal = state.ordinal[..., :state.live]
        assert torch.equal(state.beside[..., :state.live], torch.stack([ordinal, 2 * ordinal]))


@settings(max_examples=100, deadline=None)
@given(budget=st.integers(1, 40), before=st.integers(0, 40), tokens=st.integers(1, 60), ties=st.booleans(),
       seed=st.integers(0, 2**31))
def test_at_most_one_frame_of_rows_moves_and_kept_rows_stay_where_they_are(budget, before, tokens, ties, seed):
    before = min(before, budget)
    generator = torch.Generator().manual_seed(seed)
    state = State(2, 2, before + tokens)
    if before:
        state.write_frame(before, torch.zeros(2, 2, before))
    state.write_frame(tokens, importances(generator, (2, 2, before + tokens), ties))
    old = state.ordinal.clone()
    state.update(budget)
    # Slots of the frame itself are free afterwards: what counts is what a carried token lost its place to.
    changed = (state.ordinal[..., :state.live] != old[..., :state.live]).sum(-1)
    survivors = (state.ordinal[..., :state.live] >= before).sum(-1)
    assert (changed <= tokens).all() and (changed <= survivors).all()
    for slot_before, slot_after in zip(old.flatten(0, 1).tolist(), state.ordinal[..., :state.live].flatten(0, 1).tolist()):
        stayed = set(slot_before[:state.live]) & set(slot_after)
        assert all(slot_before.index(ordinal) == slot_after.index(ordinal) for ordinal in stayed)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_equal_importance_keeps_the_earlier_token_wherever_it_stands(implementation):
    state = State(1, 1, 6)
    state.write_frame(6, torch.zeros(1, 1, 6))
    state.ordinal[0, 0] = torch.tensor([5, 4000000000, 1, 7, 0, 3])  # above 2**31: the tie-break has room for it
    state.update(3, implementation)
    assert state.kept().tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_nothing_moves_while_everything_fits(implementation):
    state = State(2, 2, 12)
    state.write_frame(8, torch.rand(2, 2, 8))
    before = state.ordinal.clone()
    state.update(8, implementation)
    assert state.live == 8 and torch.equal(state.ordinal, before)


def test_denormal_and_large_importances_rank_by_value():
    state = State(1, 1, 5)
    state.write_frame(5, torch.tensor([[[0.0, 1e-44, 1e-30, 1e30, 3.0]]]))
    state.update(3)
    assert state.kept().tolist() == [[[2, 3, 4]]]


@pytest.mark.parametrize('change, words', [
    ({'budget': 0}, 'budget must be a positive number of tokens, got 0'),
    ({'live': 9}, 'live must be at most 8 slots, got 9'),
    ({'live': -1}, 'live must be at most 8 slots, got -1'),
    ({'value': torch.zeros(1, 2, 7, 3)}, r'got \(1, 2, 8, 3\) and \(1, 2, 7, 3\)'),
    ({'ordinal': torch.zeros(1, 2, 8, dtype=torch.int32)}, 'ordinal must be int64 .* got torch.int32'),
    ({'importance': torch.zeros(1, 2, 8, dtype=torch.float64)}, 'importance must be float32 .* got torch.float64'),
    ({'implementation': 'fast'}, "implementation must be one of slots, naive, got 'fast'"),
])
def test_bad_arguments_are_errors_that_name_them(change, words):
    arguments = {'key': torch.zeros(1, 2, 8, 3), 'value': torch.zeros(1, 2, 8, 3), 'ordinal': torch.zeros(1, 2, 8).long(),
                 'importance': torch.zeros(1, 2, 8), 'live': 8, 'budget': 4}
    with pytest.raises(ValueError, match=words):
        update_state(**arguments | change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_the_host_never_waits_for_the_gpu_and_both_keep_the_same():
    generator = torch.Generator().manual_seed(0)
    here, there = State(3, 2, 80), State(3, 2, 80, 'cuda')
    for _ in range(20):
        importance = importances(generator, (3, 2, here.live + 16), ties=True)
        # Slots are the implementation's own, alike on both devices only as long as both choose alike.
        here.write_frame(16, importance)
        there.write_frame(16, importance.cuda())
        here.update(64)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            there.update(64)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert torch.equal(there.ordinal[..., :there.live].cpu(), here.ordinal[..., :here.live])
        assert torch.equal(there.key[..., :there.live, :].cpu(), here.key[..., :here.live, :])
