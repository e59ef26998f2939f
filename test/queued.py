"""A stand-in for CUDA graphs that does what they do: the operations that were queued are queued again, with the tensors that they
had, whatever was written there since, and the numbers that the host gave them then, whatever it knows now."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_WAITS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique_consecutive')


class Queued(TorchDispatchMode):
    """A `Recorder`. As on a device, nothing has been computed before the first replay.

    Attributes:
        recorded: functions so far.
    """
    active: 'Queued | None' = None

    def __init__(self):
        super().__init__()
        self.recorded, self._work = 0, []

    def __call__(self, function):
        self._work = work = []
        Queued.active = self
        try:
            with self:
                result = function()
        finally:
            Queued.active = None
        self.recorded += 1
        for _, _, _, made in work:
            for tensor in made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

        @torch.inference_mode()
        def replay():
            for again, args, kwargs, made in work:
                for tensor, new in zip(made, _made(again(*args, **kwargs), args, kwargs), strict=True):
                    tensor.copy_(new)

        return replay, result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:      # under torch.inference_mode operations come here whole
            if (parts := function.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        if function.overloadpacket.__name__ in _WAITS:
            raise RuntimeError('operation not permitted when stream is capturing')
        result = function(*args, **kwargs)
        if not function.is_view:
            self._work.append((function, args, kwargs, _made(result, args, kwargs)))
        return result

    def kernel(self, function, args: tuple, kwargs: dict):
        """Queue a call as one operation, whatever its function does on this machine."""
        with _disable_current_modes():
            result = function(*args, **kwargs)
        self._work.append((function, args, kwargs, _made(result, args, kwargs)))
        return result


def as_kernels(patch, *names: str) -> None:
    """Have functions by name, with their modules, be one operation each: their naive twins look at what is on the device."""
    for name in names:
        module, _, attribute = name.rpartition('.')
        function = getattr(__import__(module, fromlist=[attribute]), attribute)

        def call(*args, _function=function, **kwargs):
            active = Queued.active
            return _function(*args, **kwargs) if active is None else active.kernel(_function, args, kwargs)

        patch.setattr(name, call)


def _made(result, args, kwargs) -> list[torch.Tensor]:
    """The tensors that are new in a result."""
    given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    return [leaf for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given]
