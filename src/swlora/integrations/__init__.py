"""swlora inside other people's loops: a loss, a trainer's mixin, a sampler, fast forwards alone."""
