import torch, time, statistics, sys
from fastpeft import ops

LL = sys.modules["fastpeft.ops.lora_linear"]
torch.set_num_threads(1)
dev = "cuda"
dt = torch.bfloat16
x = torch.zeros(2048, 4096, device=dev, dtype=dt)
w = torch.zeros(4096, 4096, device=dev, dtype=dt)
a = torch.zeros(16, 4096, device=dev, dtype=dt)
b = torch.zeros(4096, 16, device=dev, dtype=dt)


def t(f, n=500):
    for _ in range(20):
        f()
    r = []
    for _ in range(9):
        s = time.process_time()
        for _ in range(n):
            f()
        r.append((time.process_time() - s) / n * 1e6)
    return round(statistics.median(r), 2)


with torch.no_grad():
    print("F.linear", t(lambda: torch.nn.functional.linear(x, w)))
    print("empty", t(lambda: torch.empty(2048, 4096, device=dev, dtype=dt)))
    y = torch.empty(2048, 4096, device=dev, dtype=dt)
    print("addmm_", t(lambda: y.addmm_(x, w.T)))
    s = torch.empty(8, 2048, 16, device=dev)
    print("sum", t(lambda: s.sum(0)), "sum.to", t(lambda: s.sum(0).to(dt)))
    print("op", t(lambda: ops.lora_linear(x, w, a, b)))
    tab = LL._planned.plans
    args = ("lora_linear", False, x, [w], [a], [b], [None], [1.0], [0.0], [None], None)
    print("planned", t(lambda: LL._planned(*args)), "table", t(lambda: tab(*args)))
    print("is_compiling", t(lambda: torch.compiler.is_compiling()))
    from torch.utils._python_dispatch import TorchDispatchMode
