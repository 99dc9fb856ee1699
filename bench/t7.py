import torch, time, statistics, sys
from bench.host_cases import *

torch.set_num_threads(1)


def t(f, n=300):
    for _ in range(20):
        f()
    r = []
    for _ in range(9):
        s = time.process_time()
        for _ in range(n):
            f()
        r.append((time.process_time() - s) / n * 1e6)
    return round(statistics.median(r), 2)


c = Case("block", False, 0.0, "bfloat16")
st = steps(c)
m = st[OURS].args[0]
x = st[OURS].args[1]
for _ in range(4):
    st[OURS]()
with torch.no_grad():
    l = m.self_attn.o_proj
    q = m.self_attn.q_proj
    print("o_proj", t(lambda: l(x)), "forward", t(lambda: l.forward(x)), "guards", t(lambda: l.fastpeft_kept[1](x)))
    from fastpeft.integrations import _fusable

    print("kept_plan", t(lambda: _fusable.kept_plan(l, x)), "run", t(lambda: _fusable.run(x, l.fastpeft_kept[2])))
    print("branch", t(lambda: q.fastpeft_branch()))
    from fastpeft.nn import sharing

    print("branch_of", t(lambda: sharing.branch_of(q)), "conditions", t(lambda: sharing._conditions(x)))
    k, v = m.self_attn.k_proj, m.self_attn.v_proj
    print("qkv", t(lambda: (q(x), k(x), v(x))))
    p = st[PEFT].args[0].self_attn
    print("PEFT qkv", t(lambda: (p.q_proj(x), p.k_proj(x), p.v_proj(x))), "one", t(lambda: p.o_proj(x)))
    bs = [sharing.branch_of(i) for i in (q, k, v)]
    from fastpeft import ops

    cols = list(map(list, zip(*bs)))
    print(
        "shared op",
        t(
            lambda: ops.lora_linear_shared(
                x, weights=cols[0], lora_as=cols[1], lora_bs=cols[2], biases=cols[3], scales=cols[4], dropouts=cols[5]
            )
        ),
    )
    LL = sys.modules["fastpeft.ops.lora_linear"]
    print(
        "table",
        t(
            lambda: LL._planned.plans(
                "s", True, x, cols[0], cols[1], cols[2], cols[3], cols[4], cols[5], [None] * 3, None
            )
        ),
    )
