"""What the kernels will do on a GPU, read from their machine code: compiled here, counted, and a time predicted.

    python -m bench.static                              the launches of a LoRA layer, one a row, beside their floors
    python -m bench.static --rank 16 --dropout 0.1 --adapters float32 --layers
                                                        less of it, and the sums over a layer

Needs no GPU; not under TRITON_INTERPRET. Counts (registers, instructions, spills, bytes) are the compiler's; every time
is **predicted** by the model in ``model.py``, whose assumptions stand at its head.
"""
