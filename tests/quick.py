"""How tests compile: quickly rather than well, as they run what they compile a few times only."""

# At this level the older emitters of loops take half of the newer ones' time; at the level of users, twice.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
