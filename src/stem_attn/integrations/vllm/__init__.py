"""vLLM: sparse prefill in an unchanged server, as an attention backend called STEM. See docs/serving.md.

Installing this package changes nothing; `--attention-backend STEM` switches it on. What happens, file by file:

    register.py     the entry point: makes the name STEM (and CUSTOM) known in every process vLLM starts
    interface.py    what the plugin uses of vLLM; whether a vLLM has it is told by its source files
    compat.py       all that differs between vLLM versions, and which were run
    settings.py     `--additional-config '{"stem": {...}}'` -> Settings, and whether Stem is selected at all
    per_request.py  what a request may choose in their place; refuses what is wrong
    layers.py       which layers stay with the dense parent, and why
    plan.py         one step's batch -> StepPlan: which tokens are sparse, at which positions, of which prompt
    builder.py      StemBuilder: the parent's metadata of the whole batch, with the plan and the dense rest's metadata
    impl.py         StemImpl: a layer's forward; sparse spans to `attend`, the rest to the dense parent
    audited.py      one sparse span audited, and attended again where it misses the target
    counters.py     what was done, by reason; worker.py gives it to `collective_rpc`, Prometheus to /metrics
    audits.py       what audits found, by layer; a part of the counters
    late.py         sums of a GPU, read without waiting for it
    cpu.py          the backend over CPUAttention: gathers keys and values from the paged cache
    cuda.py         the backend over FlashAttention: reads the paged cache through the block table

StemBuilder and StemImpl are mixins that stand before the parent's class. A device's backend file writes the
classes themselves and one method, `attend`, which does the sparse spans of one layer.
Everything below `compat.py` imports vLLM; `plan.py` and what counts do not, and are tested without it.
"""
