import torch, sys, cProfile, pstats
from bench.host_cases import *

torch.set_num_threads(1)
c = Case("block", sys.argv[1] == "t", 0.0, "bfloat16")
st = steps(c)[sys.argv[2]]
for _ in range(10):
    st()
with torch.autograd.set_multithreading_enabled(False):
    pr = cProfile.Profile()
    pr.enable()
    for _ in range(200):
        st()
    pr.disable()
pstats.Stats(pr).sort_stats("tottime").print_stats(28)
