"""`ipadapter-jax doctor`: what it is told, which is nothing."""

import dataclasses


@dataclasses.dataclass
class Doctor:
    """Shows devices, versions, caches and what is missing; exits with 1 when something required is."""
