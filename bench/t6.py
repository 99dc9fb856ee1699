import gc, weakref, torch, copy, pickle
from bench.host_cases import *

c = Case("block", True, 0.0, "bfloat16")
st = steps(c)
m = st[OURS].args[0]
for _ in range(4):
    st[OURS]()
l = m.self_attn.q_proj
print(type(l), "fastpeft_kept" in l.__dict__, l.fastpeft_kept[1](None))
d = copy.deepcopy(l)
print("fastpeft_kept" in d.__dict__)
r = weakref.ref(l)
del l, m, st
gc.collect()
print("freed", r() is None)
