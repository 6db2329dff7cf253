"""bdbench: put any backdoor attack on image classifiers against any defense.

The stages are `bdbench.stages.poison`, `defend` and `evaluate`; the command line calls the same three.
"""

__version__ = "0.1.0"
