"""What an adapted backbone is worth: embeddings, linear probes, leakage, reports, and the demo.

`embed` and `evaluation` are what `fino-fast embed` and `fino-fast evaluate` do; `study` is one seed
of `fino-fast demo`.
"""
