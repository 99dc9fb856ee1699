"""transformers' own continuous batching (paged cache, ``generate_batch``) with an adapter for each request.

    outputs = generate_batch(bank, [ids, ids], adapter_names=["alice", None], max_new_tokens=32)

transformers has no hook for this, so one method of its manager is replaced, on the instance: around each step, the
requests that the step has packed into ``[1, T]`` tell the bank whose tokens are whose. What it needs of transformers is
looked for, and named if it is missing. Left out, because a step must pass through Python with its own tokens only: CUDA
graphs, compilation, asynchronous batches; and sharing of cache blocks, because equal prompts of different adapters have
different keys and values. Where streams of requests, cancellation or sampling by request are needed, use
``fastpeft.serving.Batcher``.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from ..serving import AdapterBank, BankError, BankFull, Lease
from ..serving.bank.lease import checked_rows

try:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput
except ImportError as error:
    raise ImportError(
        "fastpeft.integrations.transformers: transformers has no continuous batching that is known, expected "
        f"transformers>=5.20 ({error})"
    ) from error

_POLL = 0.05  # seconds between looks at whether a lease has come free


def generate_batch(
    bank: AdapterBank,
    inputs: Sequence[Sequence[int]],
    adapter_names: Sequence[str | None],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
) -> list[GenerationOutput]:
    """``model.generate_batch`` with one adapter, or None, for each prompt; requests join and leave at every step.

    Args:
        bank: around a causal language model of transformers.
        inputs: token ids of each prompt.
        adapter_names: for each prompt the name of its adapter, or None for the bare model.
        generation_config: None is the model's. Sampling settings are one for all requests, and each gives one sequence.
        continuous_batching_config: sizes of the cache and the batch; what cannot be served is turned off in a copy.
        max_new_tokens: for all, or one for each prompt; None is the generation config's.

    Returns:
        transformers' ``GenerationOutput`` of each prompt, in their order; a request that failed has ``error``.

    Raises:
        UnknownAdapter: no adapter has that name.
        BankFull: every slot is pinned, or leased by others.
        BankError: transformers' continuous batching has changed, or its thread has ended.
        TypeError: ``adapter_names`` is no list of names and None.
        ValueError: the lists differ in length, or the generation config asks for what continuous batching ignores.
    """
    rows = checked_rows("generate_batch", adapter_names)
    if len(rows) != len(inputs):
        raise ValueError(f"generate_batch: adapter_names has {len(rows)} items, expected {len(inputs)}, one an input")
    counts = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(inputs)
    if len(counts) != len(inputs):
        raise ValueError(f"generate_batch: max_new_tokens has {len(counts)} items, expected {len(inputs)}")
    model: Any = bank.model
    generation_config = generation_config or model.generation_config
    ignored = _ignored(model, generation_config)
    if ignored:
        text = f"generate_batch: generation_config has {', '.join(ignored)}"
        raise ValueError(f"{text}, which transformers' continuous batching ignores")
    leases: dict[str, Lease | None] = {}
    outputs: dict[str, GenerationOutput] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(_release, leases)
        manager = stack.enter_context(
            model.continuous_batching_context_manager(
                generation_config=generation_config,
                continuous_batching_config=_plain(continuous_batching_config),
                warmup=False,
            )
        )
        _ride_along(manager, bank, leases)
        waiting = [(f"fastpeft_{i}", *rest) for i, rest in enumerate(zip(inputs, rows, counts, strict=True))]
        names = [name for name, *_ in waiting]
        while len(outputs) < len(names):
            waiting = _feed(manager, bank, waiting, leases, running=len(leases) > len(outputs))
            output = manager.get_result(timeout=_POLL)
            if output is not None and output.is_finished():
                outputs[output.request_id] = output
                _release({output.request_id: leases[output.request_id]})
            elif output is None and not manager.is_running():
                raise BankError("generate_batch: transformers' generation thread has ended; its log has the reason")
    return [outputs[name] for name in names]


def _release(leases: dict[str, Lease | None]) -> None:
    for lease in leases.values():
        if lease is not None:
            lease.release()


def _ignored(model: Any, config: GenerationConfig | None) -> list[str]:
    """What the config asks for and would not get."""
    found = [
        f"{name}={value}"
        for name in ("num_beams", "num_return_sequences")
        if (value := getattr(config, name, None) or 1) > 1
    ]
    found += [f"{name}={value!r}" for name in ("stop_strings", "max_time") if (value := getattr(config, name, None))]
    # transformers drops the processors that say so of themselves, with a warning in the log.
    processors = model._get_logits_processor(config)
    return found + [type(p).__name__ for p in processors if getattr(p, "supports_continuous_batching", True) is False]


def _feed(manager, bank: AdapterBank, waiting: list, leases: dict, running: bool) -> list:
    """Hand over the requests whose adapters find a slot, first come first served; returns those that wait on."""
    for i, (name, ids, adapter, count) in enumerate(waiting):
        try:
            leases[name] = None if adapter is None else bank._lease("generate_batch", adapter)
        except BankFull:
            if not running:
                raise
            return waiting[i:]
        manager.add_request(list(ids), request_id=name, max_new_tokens=count)
        running = True
    return []


def _ride_along(manager: Any, bank: AdapterBank, leases: dict) -> None:
    """Have every step of the manager run under the bank's ``use``, with the adapters of the tokens it has packed."""
    missing = [name for name in ("_generation_step", "get_result", "add_request") if not hasattr(manager, name)]
    missing += [name for name in ("state", "query_length", "has_new_token") if not hasattr(FutureRequestState, name)]
    if missing:
        raise BankError(f"generate_batch: transformers' continuous batching has no {', '.join(missing)}")
    step = manager._generation_step

    def with_adapters() -> None:
        batch = manager.batch_processor.inputs_and_outputs
        rows, lengths, picked = [], [], []
        for request in batch.requests_in_batch:
            rows.append(leases[request.state.request_id])
            lengths.append(request.query_length)
            if request.has_new_token:
                picked.append(sum(lengths) - 1)
        if sum(lengths) != batch.num_q_tokens:
            raise BankError(
                f"generate_batch: {batch.num_q_tokens} tokens in a step, expected {sum(lengths)} of requests"
            )
        # The stream that the step will run on, so that it is the one that waits for copies into slots.
        stream = torch.cuda.stream(batch.compute_stream) if bank.device.type == "cuda" else contextlib.nullcontext()
        with stream, bank.use(rows, lengths, picked):
            step()

    manager._generation_step = with_adapters


def _plain(config: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """A copy of the config without what cannot be served."""
    off = {
        "allow_block_sharing": False,
        "use_async_batching": False,
        "use_cuda_graph": False,
        "varlen_compile_config": None,
        "decode_compile_config": None,
        "default_compile_level": 0,
    }
    known = {field.name for field in fields(ContinuousBatchingConfig) if field.init}
    if not known >= off.keys():
        raise BankError(f"generate_batch: ContinuousBatchingConfig has no {', '.join(sorted(off.keys() - known))}")
    given = {} if config is None else {name: getattr(config, name) for name in known}
    return ContinuousBatchingConfig(**{**given, **off})
