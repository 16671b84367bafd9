"""Sessions: a compressed model on disk, and back.

A session is a folder `<root>/<session id>/` with two files:

    weights.safetensors   every tensor; the codes of a ternary layer are packed four to a byte, each output
                          channel beginning a new one
    manifest.json         format version, architecture, layer table, metrics, SHA-256 of the weights

Loading rebuilds a reference architecture (`architectures.py`) from its configuration. Nothing is unpickled
and no code from the session runs. For any other model the caller passes an instance to load into.

Small files: with `latents=False` the float latents of ternary layers are left out. On loading they become
codes * scale / (share of codes that are not zero). The mean magnitude of that is the scale, and a nonzero
entry divided by the scale is at least 1, so quantizing it again gives exactly the stored codes and scale.
Plain codes * scale would not do: its mean magnitude is smaller than the scale, and the model would
change at its first step of training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from phase4_bitnet.architectures import REGISTRY, build_model_from_dict
from phase4_bitnet.durable_folder import recover, write_file, write_folder
from phase4_bitnet.layers import TernaryWeight, ternary_layers
from phase4_bitnet.packing import pack_codes, unpack_codes

FORMAT = "forge-session"
FORMAT_VERSION = 1
ENCODING = "2bit"
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def session_folder(session_id: str | Path, root: str | Path | None = None) -> Path:
    """The folder of a session.

    Args:
        session_id: a name of up to 128 letters, digits, '.', '_' and '-' (str), or a folder (Path), taken
            as it is.
        root: where sessions live; None is the environment variable FORGE_SESSIONS, else "sessions".

    Returns:
        The folder, which need not exist.

    Raises:
        ValueError: the name could leave the root or is no name at all.

    >>> session_folder("my_run", root="/data").as_posix()
    '/data/my_run'
    """
    if isinstance(session_id, Path):
        return session_id
    if not isinstance(session_id, str) or not _SESSION_ID.fullmatch(session_id):
        raise ValueError(
            f"session id {session_id!r} is not a name of up to 128 letters, digits, '.', '_' and '-' that "
            "starts with a letter or digit; rename it, or pass pathlib.Path(...) to name a folder"
        )
    return Path(root if root is not None else os.environ.get("FORGE_SESSIONS") or "sessions") / session_id


def save_compressed_model(
    model: nn.Module,
    session_id: str | Path,
    *,
    root: str | Path | None = None,
    metrics: Mapping[str, Any] | None = None,
    latents: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a model as a session; the folder appears complete or not at all.

    Args:
        model: any module; its ternary layers are stored packed. A compiled or DDP wrapper is opened.
        session_id: name, or Path of the folder, as for `session_folder`.
        root: where sessions live, as for `session_folder`.
        metrics: JSON values to keep with the model. "compression_ratio" (bytes in float32 over bytes
            without latents) is computed when not given; "speedup" is None unless you measured it.
        latents: keep the float latents, so that training goes on exactly where it stopped. False
            gives the small file.
        overwrite: replace a session of that name.

    Returns:
        The folder written.

    Raises:
        ValueError: a bad session id, metrics that JSON cannot hold, or a model without weights.
        FileExistsError: the session exists and `overwrite` is False.

    >>> import tempfile
    >>> from phase4_bitnet.architectures import build_model
    >>> model = build_model("mlp", in_features=4, hidden=(8,), num_outputs=2)
    >>> with tempfile.TemporaryDirectory() as root:
    ...     folder = save_compressed_model(model, "my_run", root=root)
    ...     twin = load_compressed_model(session_id="my_run", root=root)
    >>> folder.name, torch.equal(twin(torch.ones(1, 4)), model(torch.ones(1, 4)))
    ('my_run', True)
    """
    folder = session_folder(session_id, root)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; pass overwrite=True, or another session id")
    model = unwrap(model)
    if any("packed_codes" in module._buffers for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is packed for inference; save the model it was packed from, with "
            "latents=False for the small file"
        )
    tensors, aliases = _collect(model)
    layers = _layer_table(model)
    if not tensors:
        raise ValueError(
            f"{type(model).__name__} has no weights to save; pass the model, not its configuration"
        )
    dense = sum(
        t.numel() * 4 if t.is_floating_point() else t.nbytes
        for k, t in tensors.items()
        if not _derived(k, layers)
    )
    for layer in layers:
        name = layer["name"]
        # A row is all of an output channel: kernels of 1 or 3 weights would not fill their bytes.
        tensors[_key(name, "codes")] = pack_codes(tensors[_key(name, "codes")].flatten(1), ENCODING)
    # A latent that a float layer shares must stay: the codes do not give it back.
    needed = {stored for other, stored in aliases.items() if not _is_latent(other, layers)}
    small = {k: t for k, t in tensors.items() if k in needed or not _is_latent(k, layers)}
    ratio = dense / sum(t.nbytes for t in small.values())
    data = safetensors.torch.save(tensors if latents else small)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "architecture": _architecture(model),
        "encoding": ENCODING,
        "latents": latents,
        "layers": layers,
        "aliases": aliases,
        "metrics": {"compression_ratio": round(ratio, 4), "speedup": None, **(metrics or {})},
        "files": {WEIGHTS: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
    }
    try:
        manifest["sha256"] = _manifest_hash(manifest)
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metrics hold something that JSON cannot ({error}); use finite numbers and text"
        ) from error

    def write(temporary: Path) -> None:
        write_file(temporary / WEIGHTS, [data])
        write_file(temporary / MANIFEST, [text.encode()])

    write_folder(folder, write)
    return folder


def load_compressed_model(
    session_id: str | Path,
    *,
    root: str | Path | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """Read a model back from a session, in eval mode.

    Args:
        session_id: name, or Path of the folder, as for `session_folder`.
        root: where sessions live, as for `session_folder`.
        model: an instance to load into, converted as the saved one was; needed when the session holds no
            reference architecture.

    Returns:
        The model: the rebuilt one on CPU, or `model` itself.

    Raises:
        FileNotFoundError: there is no such session.
        ValueError: damaged or changed files, a newer format, or weights that do not fit `model`.
    """
    return load_session(session_id, root=root, model=model)["model"]


def load_session(
    session_id: str | Path,
    *,
    root: str | Path | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Read a session as the dictionary that the training phase takes.

    Args:
        session_id: as for `load_compressed_model`.
        root: as for `load_compressed_model`.
        model: as for `load_compressed_model`.

    Returns:
        {"model": the model in eval mode, "metrics": {"compression_ratio": float, "speedup": float or None,
        ...what was saved}}.

    Raises:
        FileNotFoundError: there is no such session.
        ValueError: as for `load_compressed_model`.
    """
    folder = session_folder(session_id, root)
    recover(folder.parent, folder.name)
    manifest = _read_manifest(folder)
    tensors = _read_weights(folder, manifest)
    built = model is None
    if model is None:
        if manifest["architecture"] is None:
            raise ValueError(
                f"{folder}: holds a {manifest['class']}, which is no reference architecture "
                f"({', '.join(REGISTRY)}); pass model=<an instance, converted as the saved one was>"
            )
        model = build_model_from_dict(manifest["architecture"])
    _fill(unwrap(model), tensors, manifest, folder, adopt_dtypes=built)
    return {"model": model.eval(), "metrics": manifest["metrics"]}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a compiled or DDP wrapper, however many there are."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _is_latent(key: str, layers: list[dict[str, Any]]) -> bool:
    return any(key == _key(layer["name"], "weight") for layer in layers)


def _derived(key: str, layers: list[dict[str, Any]]) -> bool:
    return any(key in (_key(layer["name"], "codes"), _key(layer["name"], "scale")) for layer in layers)


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state on CPU, each shared tensor once, and {other name: the name it is stored under}."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {key!r} is {type(value).__name__}, not a tensor; a session holds tensors only"
            )
        if value.is_meta:
            raise ValueError(f"state {key!r} is on the meta device and has no values; load the weights first")
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in seen:
            aliases[key] = seen[place]
            continue
        seen[place] = key
        # A copy: views into one storage are legal in torch and not in safetensors.
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _layer_table(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": type(layer).__name__,
            "shape": list(layer.codes.shape),
            "weight_bits": layer.weight_bits,
            "quantization_mode": layer.quantization_mode,
            "scale": float(layer.scale),
            "zero_share": float((layer.codes == 0).float().mean()) if layer.codes.numel() else 0.0,
        }
        for name, layer in ternary_layers(model)
    ]


def _architecture(model: nn.Module) -> dict[str, Any] | None:
    """The configuration, if what it builds has this model's state; None for a foreign or changed model."""
    config = getattr(model, "config", None)
    for config_class, model_class in REGISTRY.values():
        if type(model) is model_class and isinstance(config, config_class):
            with torch.device("meta"):
                twin = model_class(config)
            shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, twin)]
            return config.to_dict() if shapes[0] == shapes[1] else None
    return None


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        known = (
            sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
            if folder.parent.is_dir()
            else []
        )
        there = f"sessions there: {', '.join(known[:8])}" if known else "there are no sessions there"
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}; {there}; save one with save_compressed_model")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); the session is damaged, save it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not the manifest of a {FORMAT}; pass the folder save_compressed_model wrote"
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {manifest.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "upgrade forge-training"
        )
    if manifest.get("sha256") != _manifest_hash(manifest):
        raise ValueError(
            f"{path}: does not match its own SHA-256; it was changed or damaged, save the session again"
        )
    return manifest


def _read_weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the session is damaged, save it again")
    data = path.read_bytes()  # hashed and parsed from one copy: the file cannot change in between
    if hashlib.sha256(data).hexdigest() != manifest["files"][WEIGHTS]["sha256"]:
        raise ValueError(
            f"{path}: does not match its SHA-256 in {MANIFEST}; it was changed or damaged, save it again"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); save the session again") from error


def _fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    manifest: Mapping[str, Any],
    folder: Path,
    *,
    adopt_dtypes: bool,
) -> None:
    """Unpack the tensors and load them, all or none."""
    for layer in manifest["layers"]:
        name, shape = layer["name"], layer["shape"]
        key, latent = _key(name, "codes"), _key(name, "weight")
        # The first sessions kept the whole shape of a convolution, each kernel row in bytes of its own.
        rows = shape if tensors[key].dim() == len(shape) else (shape[0], math.prod(shape[1:]))
        tensors[key] = unpack_codes(tensors[key], rows, manifest["encoding"]).reshape(shape)
        if latent not in tensors and latent not in manifest["aliases"]:
            tensors[latent] = latent_of(tensors[key], tensors[_key(name, "scale")])
    for other, stored in manifest["aliases"].items():
        tensors[other] = tensors[stored]
    state = model.state_dict()
    _check_fit(model, state, tensors, manifest, folder)
    if adopt_dtypes:
        # A model saved in bf16 comes back in bf16; load_state_dict alone would widen it in silence.
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in tensors:
                tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=True)


def latent_of(codes: Tensor, scale: Tensor) -> Tensor:
    """A float32 latent whose codes and scale are exactly these; see the module's docstring."""
    nonzero = (codes != 0).double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return (codes.double() * (scale.double() / nonzero)).float()


def _check_fit(
    model: nn.Module,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    folder: Path,
) -> None:
    ours, kind = {name for name, _ in ternary_layers(model)}, type(model).__name__
    theirs = {layer["name"] for layer in manifest["layers"]}
    if ours != theirs:
        name = sorted(ours ^ theirs)[0]
        where, other = ("session", "model") if name in theirs else ("model", "session")
        raise ValueError(
            f"{folder}: layer {name!r} is ternary in the {where} and not in the {other}; convert the {kind} "
            "with convert_model_to_bitnet as the saved model was"
        )
    for key in [*tensors, *state]:
        if key not in state or key not in tensors:
            where, other = ("session", "model") if key in tensors else ("model", "session")
            raise ValueError(
                f"{folder}: {key!r} is in the {where} and not in the {other}; pass the kind of model that "
                f"was saved, a {manifest['class']}"
            )
        if tensors[key].shape != state[key].shape:
            raise ValueError(
                f"{folder}: {key!r} has shape {tuple(tensors[key].shape)} in the session and "
                f"{tuple(state[key].shape)} in the model; build the {kind} with the sizes it was saved with"
            )
    for name, layer in ternary_layers(model):
        _check_layer(name, layer, manifest, folder)


def _check_layer(name: str, layer: TernaryWeight, manifest: Mapping[str, Any], folder: Path) -> None:
    saved = next(row for row in manifest["layers"] if row["name"] == name)
    for option in ("weight_bits", "quantization_mode"):
        if saved[option] != getattr(layer, option):
            raise ValueError(
                f"{folder}: layer {name!r} was saved with {option}={saved[option]!r}, the model has "
                f"{getattr(layer, option)!r}; convert it with {option}={saved[option]!r}"
            )
