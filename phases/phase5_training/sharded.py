"""A model in parts (FSDP2): each rank keeps some rows of every weight, of its gradient and its averages.

The optimizers see the rows of this rank as plain tensors that share memory with FSDP's parameters, so that
torch's optimizers, the gradient filter and the one-pass kernel work as they do on whole weights. What needs
the whole is added up over the ranks: the norm that gradients are clipped to, and the mean magnitude that
the scale of a ternary layer is, one all-reduce a step for all layers together.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from phase4_bitnet.layers import TernaryWeight, ternary_layers
from phase4_bitnet.sharding import ShardedLatent, magnitudes, pack_rows, plain_rows
from phase4_bitnet.ternary import requantize_
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks, Traffic
from phase5_training.errors import UsageError
from phase5_training.muon import Muon
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.shared_memory import SharedMemory, add_up_, memory_for

# Of training with AdamW and a float32 slow average: latent, gradient, two moments, average, code.
BYTES_A_WEIGHT = 4 + 4 + 8 + 4 + 1
# Weights that stay gathered from forward to backward take at most this share of a rank's state of training.
MOST_GATHERED = 0.25

_CODES = (".codes", ".scale")
# They have other names from torch 2.13 on.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """What the ranks of a sharded model send each other, and what of it has not arrived yet.

    On a CPU gradients travel beside the backward, through memory that the ranks share or else by gloo, and
    are awaited before the optimizer's step reads them.

    Args:
        ranks: of the model; their traffic counts the bytes.
        dtype: in which gradients on a CPU travel; None is their own. They are added up in their own.
        memory: that the ranks share, with room for the gradients of a backward.
    """

    def __init__(
        self, ranks: Ranks, dtype: torch.dtype | None = None, memory: SharedMemory | None = None
    ) -> None:
        self.ranks, self.traffic, self.dtype, self.memory = ranks, ranks.traffic, dtype, memory
        self.step = 0
        self._arriving: list[tuple[Callable[[], Sequence[Tensor]], Tensor]] = []

    def begin(self, output: Tensor, own: Tensor, group: Any) -> None:
        """Send each rank its part of this rank's gradients; ``output`` is their sum after :meth:`finish`.

        Half the bytes of gloo's reduce-scatter, which adds up everything everywhere and keeps a part.

        Args:
            output: (n,) on a CPU.
            own: (n * ranks,).
            group: of the ranks.
        """
        sent = own if self.dtype is None else own.to(self.dtype)
        self.traffic.reduced += sent.nbytes
        self._arriving.append((self._parts(sent, len(output), group), output))

    def _parts(self, sent: Tensor, length: int, group: Any) -> Callable[[], Sequence[Tensor]]:
        """What waits for this rank's part, (length,), of what each rank sends, and gives them."""
        memory = self.memory
        if memory is not None:
            posted, start = memory.post(sent), self.ranks.rank * length
            return lambda: [part[start : start + length] for part in memory.parts(posted)]
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=group, async_op=True)

        def awaited() -> Sequence[Tensor]:
            work.wait()
            return received.split(length)

        return awaited

    def finish(self) -> None:
        """Wait for what was begun, and add it up."""
        for parts, output in self._arriving:
            add_up_(output, parts())
        if self._arriving and self.memory is not None:
            self.memory.release()
        self._arriving.clear()

    def next_step(self) -> None:
        """The gradients so far have been used, and are forgotten."""
        self.finish()
        self.step += 1


class _Buffers:
    """Where FSDP's collectives put what they send and receive."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Buffers, AllGather):
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self._traffic.gathered += input_tensor.nbytes
        # A CPU has no streams: FSDP waits for what is returned, when the weights are used.
        beside = async_op or input_tensor.device.type == "cpu"
        return _ALL_GATHER(output_tensor, input_tensor, group=group, async_op=beside)


class _Scatter(_Buffers, ReduceScatter):
    """Adds up the gradients of the weights that are gathered together."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._last = -1

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        exchange = self._exchange
        if input_tensor.device.type != "cpu":
            exchange.traffic.reduced += input_tensor.nbytes
            return _REDUCE_SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        later = self._last == exchange.step  # micro-batch, which FSDP adds to the gradient at once
        if later:
            exchange.finish()  # what is of the one before
        exchange.begin(output_tensor, input_tensor, group)
        if later:
            exchange.finish()
        self._last = exchange.step
        return None


def shard(model: nn.Module, config: TrainingConfig, ranks: Ranks, device: torch.device) -> Exchange:
    """Leave this rank its rows of every weight, in place; what is called stays ``model`` itself.

    Blocks, the elements of a ModuleList that have parts, are gathered one at a time; the rest at once.

    Args:
        model: the same on all ranks.
        config: ``gradient_compression``, and what cannot be done in parts.
        ranks: how many parts.
        device: where the model is.

    Returns:
        What :class:`ShardedOptimizer` waits for; it counts the bytes in the traffic of ``ranks``.

    Raises:
        UsageError: an option that needs whole weights.
    """
    _refuse(config)
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    ranks.level_([p.detach() for p in model.parameters()])
    _mark_latents(model, ranks.world_size)
    reduce = torch.bfloat16 if config.gradient_compression == "bf16" else None
    own = [(-(-len(p) // ranks.world_size), p) for p in model.parameters()]  # rows of a rank, the last padded
    sizes = [rows * ranks.world_size * p[0].numel() * (reduce or p.dtype).itemsize for rows, p in own]
    exchange = Exchange(ranks, reduce, memory_for(sizes, ranks, device))
    policy = MixedPrecisionPolicy(reduce_dtype=None if device.type == "cpu" else reduce)
    blocks = blocks_of(model)
    again = not may_stay_gathered(model, blocks, ranks.world_size)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _gather_ahead(model, blocks, all_at_once=not again)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_Gather(ranks.traffic))
            module.set_custom_reduce_scatter(_Scatter(exchange))
            # Each rank's loss is its share of the batch's: gradients are added up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for _, layer in ternary_layers(model):
        _keep_own_codes(layer)
    model.register_load_state_dict_pre_hook(_parts_of_whole)
    return exchange


def _refuse(config: TrainingConfig) -> None:
    if config.quantization_mode == "stochastic":
        raise UsageError(
            "quantization_mode='stochastic' draws codes that parts of a model do not store; use "
            "parallel='ddp', or quantization_mode='deterministic'"
        )
    if config.filter == "ma":
        raise UsageError("filter='ma' keeps a window of whole gradients; use parallel='ddp', or filter='ema'")
    if config.compile is True:
        raise UsageError("compile=True does not go with parallel='fsdp' yet; use compile=False or 'auto'")


def _mark_latents(model: nn.Module, parts: int) -> None:
    """Let FSDP gather the codes of ternary weights whose rows divide evenly; other weights travel whole."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((module, name))
    for places in owners.values():
        module, name = places[0]
        old = module._parameters[name]
        assert old is not None
        coded = len(places) == 1 and isinstance(module, TernaryWeight) and name == "weight"
        if coded and old.shape[0] % parts == 0:
            marked = nn.Parameter(ShardedLatent(old.detach()), requires_grad=old.requires_grad)
            module._parameters[name] = marked


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered by itself: the outermost elements of module lists that are more than a layer."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            found += [m for m in module if next(m.children(), None) is not None]
        else:
            found += blocks_of(module)
    return found


def may_stay_gathered(model: nn.Module, blocks: Sequence[nn.Module], parts: int) -> bool:
    """Whether blocks stay gathered from forward to backward: as codes they take little, and travel once.

    Args:
        model: with its latents marked.
        blocks: of the model.
        parts: number of ranks.
    """
    own = [p for block in blocks for p in block.parameters()]
    gathered = sum(p.numel() // 4 if isinstance(p, ShardedLatent) else p.nbytes for p in own)
    state = BYTES_A_WEIGHT * sum(p.numel() for p in model.parameters()) / parts
    return gathered <= MOST_GATHERED * state


def _gather_ahead(model: Any, blocks: Sequence[Any], *, all_at_once: bool) -> None:
    """Have blocks gathered while those before them compute: all from the start where all stay, else the next.

    Args:
        model: sharded.
        blocks: of it, sharded, in the order in which it calls them.
        all_at_once: whether they stay.
    """
    if all_at_once:
        model.set_modules_to_forward_prefetch(list(blocks))
        return
    for first, second in itertools.pairwise([model, *blocks]):
        first.set_modules_to_forward_prefetch([second])


def _keep_own_codes(layer: TernaryWeight) -> None:
    layer.sharded = True
    latent = local_part(layer.weight)
    if not codes_travel(layer):
        return  # gathered in float, and its codes derived where it is used
    for name, value in (("codes", torch.empty_like(latent, dtype=torch.int8)), ("scale", layer.scale)):
        delattr(layer, name)
        layer.register_buffer(name, value, persistent=False)
    layer.register_buffer("packed_codes", pack_rows(layer.codes.zero_()), persistent=False)


def codes_travel(layer: TernaryWeight) -> bool:
    """Whether FSDP gathers the codes of a sharded layer, and not its latent."""
    return isinstance(layer.weight, DTensor) and isinstance(layer.weight._local_tensor, ShardedLatent)


def local_part(value: Tensor) -> Tensor:
    """This rank's rows, a plain tensor that shares their memory."""
    own = value._local_tensor if isinstance(value, DTensor) else value
    return plain_rows(own).detach()


def rows_of_rank(value: Tensor, like: DTensor) -> DTensor:
    """The part of a tensor that this rank has of ``like``, without asking the others.

    Args:
        value: whole, or rows of this rank as a checkpoint holds them.
        like: of the same shape; where its rows are, these will be.
    """
    if isinstance(value, DTensor):
        return as_part(local_part(value).to(like.device), like)
    mesh = like.device_mesh
    chunks = torch.chunk(value, mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    own = chunks[rank] if rank < len(chunks) else value[:0]
    return as_part(own.to(like.device), like)


def as_part(own: Tensor, like: DTensor) -> DTensor:
    """This rank's rows as a part of a tensor of the shape of ``like``."""
    return DTensor.from_local(
        own.contiguous(),
        like.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _parts_of_whole(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
    """Before loading: rows of this rank out of whole weights; codes follow from them."""
    own = dict(module.named_parameters())
    for name in list(state):
        if name.endswith(_CODES) and name.rpartition(".")[0] + ".weight" in own:
            del state[name]
        elif isinstance(own.get(name), DTensor) and state[name].shape == own[name].shape:
            state[name] = rows_of_rank(state[name], own[name])  # type: ignore[arg-type]


class ShardedMuon(Muon):
    """Muon on rows: the update is gathered, and orthogonalized as a whole on every rank.

    Args:
        params: this rank's rows. others: as for :class:`Muon`.
    """

    wholes: Mapping[Tensor, DTensor]
    traffic: Traffic

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        like = self.wholes[p]
        own = self._update_of(p, grad, group)
        self.traffic.gathered += own.nbytes
        update = as_part(own, like).full_tensor()
        tall, left, right = self._factors(update, group)
        direction = left @ right
        rows = local_part(rows_of_rank(direction.t() if tall else direction, like))
        keep, scale = self._rates(like, group)
        p.mul_(keep).add_(rows, alpha=scale)


class ShardedOptimizer(BitNetOptimizer):
    """:class:`BitNetOptimizer` over the rows of this rank.

    Args:
        optimizers: by name, over FSDP's parameters, not stepped yet; made anew over this rank's rows.
        model: sharded.
        exchange: brings the gradients.
        options: of :class:`BitNetOptimizer`.
    """

    _whole_layers = False

    def __init__(
        self, optimizers: Sequence[Optimizer], model: nn.Module, *, exchange: Exchange, **options: Any
    ) -> None:
        self._exchange = exchange
        self._parts: list[tuple[nn.Parameter, nn.Parameter]] = []
        local: dict[Tensor, nn.Parameter] = {}
        for p in model.parameters():
            if isinstance(p, DTensor):
                local[p] = nn.Parameter(local_part(p), requires_grad=p.requires_grad)
                self._parts.append((p, local[p]))
        super().__init__([_over_rows(o, local, exchange.traffic) for o in optimizers], model, **options)
        for layer in self._layers:
            if not codes_travel(layer):
                layer.codes_are_current = False

    def step(self, *arguments: Any, **options: Any) -> Any:
        """See :meth:`BitNetOptimizer.step`."""
        self._exchange.finish()
        for p, own in self._parts:
            own.grad = None if p.grad is None else local_part(p.grad)
        return super().step(*arguments, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of FSDP too."""
        self._exchange.next_step()
        for p, own in self._parts:
            p.grad = own.grad = None
        super().zero_grad(set_to_none)

    def _total_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        # What every rank has whole, as the parameters of a loss, is added by the first.
        whole = self._of_whole_parameters() if dist.get_rank() else set()
        mine = [t for t in tensors if t.numel() and id(t) not in whole]
        own = super()._total_norm(mine or [tensors[0].new_zeros(1)])
        squared = own.double().square().reshape(1)
        return self._exchange.ranks.begin_sum(squared)()[0].sqrt().float()

    def _of_whole_parameters(self) -> set[int]:
        """The gradients and the state of parameters of which this rank has not rows, by id."""
        parts, state = {id(own) for _, own in self._parts}, self.state
        whole = [p for g in self.param_groups for p in g["params"] if id(p) not in parts]
        return {id(t) for p in whole for t in (p.grad, *state.get(p, {}).values())}

    def _requantize(self, layers: Sequence[TernaryWeight]) -> None:
        mine = [layer for layer in layers if codes_travel(layer)]
        if not mine:
            return
        latents = [local_part(layer.weight) for layer in mine]
        sums = self._exchange.ranks.begin_sum(magnitudes(latents))()
        counts = torch.tensor([layer.weight.numel() for layer in mine], dtype=sums.dtype, device=sums.device)
        means = (sums / counts).float()
        for bits in (1.58, 1):
            of = [i for i, layer in enumerate(mine) if layer.weight_bits == bits]
            codes, scales = [mine[i].codes for i in of], [mine[i].scale for i in of]
            requantize_([latents[i] for i in of], codes, scales, bits, means=means[of])
        for layer in mine:
            packed: Any = layer.packed_codes
            packed.copy_(pack_rows(layer.codes))

    def _flip_shares(self, before: Sequence[Tensor]) -> Tensor | None:
        return _over_ranks(super()._flip_shares(before))

    def layer_zero_share(self) -> Tensor | None:
        """See :meth:`BitNetOptimizer.layer_zero_share`; parts are of one size."""
        return _over_ranks(super().layer_zero_share())

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`BitNetOptimizer.state_dict`; rows as parts of whole tensors."""
        state = super().state_dict()
        whole = {id(own): p for p, own in self._parts}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for index, like, values in _indexed(optimizer, saved, whole):
                saved["state"][index] = {
                    name: as_part(v, like) if v.shape == like._local_tensor.shape else v
                    for name, v in values.items()
                }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` of any number of ranks, and the codes from the latents."""
        whole = {id(own): p for p, own in self._parts}
        loaded = []
        for optimizer, saved in zip(self.optimizers, state_dict["optimizers"], strict=False):
            rows = {**saved, "state": dict(saved["state"])}
            for index, like, values in _indexed(optimizer, saved, whole):
                rows["state"][index] = {
                    name: local_part(rows_of_rank(v, like)) if v.shape == like.shape else v
                    for name, v in values.items()
                }
            loaded.append(rows)
        super().load_state_dict({**state_dict, "optimizers": loaded})
        self._requantize(self._layers)


def _over_rows(optimizer: Optimizer, local: Mapping[Any, nn.Parameter], traffic: Traffic) -> Optimizer:
    """The same optimizer over this rank's rows."""
    if isinstance(optimizer, torch.optim.Muon):
        held = [p for g in optimizer.param_groups for p in g["params"]]
        made = ShardedMuon([local[p] for p in held], **optimizer.defaults)
        made.wholes = {local[p]: p for p in held if isinstance(p, DTensor)}
        made.traffic = traffic
        return made
    for group in optimizer.param_groups:
        group["params"] = [local.get(p, p) for p in group["params"]]
    return optimizer


def _indexed(
    optimizer: Optimizer, saved: Mapping[str, Any], whole: Mapping[int, nn.Parameter]
) -> list[tuple[int, DTensor, dict[str, Tensor]]]:
    """Index, whole parameter and state of each parameter of which this rank has rows."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    indices = [i for g in saved["param_groups"] for i in g["params"]]
    return [
        (index, whole[id(p)], saved["state"][index])  # type: ignore[misc]
        for index, p in zip(indices, params, strict=True)
        if id(p) in whole and index in saved["state"]
    ]


def _over_ranks(share: Tensor | None) -> Tensor | None:
    """Shares over parts of one size, over all of them."""
    if share is None:
        return None
    dist.all_reduce(share)
    return share / dist.get_world_size()


def whole_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state of a sharded model with whole weights, on the CPU, where ``keep``; all ranks take part."""
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu()
    return state
