"""`ipadapter-jax doctor`, which has no options."""

import dataclasses


@dataclasses.dataclass
class Doctor:
    """Shows devices, versions, caches, and what is missing; exits with 1 when something required is missing."""
