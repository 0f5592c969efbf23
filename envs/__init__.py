"""Gymnasium environments over an `ajpq.problem.Problem`.

`gymnasium.make("envs:ajpq/Layer-v0", problem=...)`, or "envs:ajpq/Channel-v0", takes the arguments of
`envs.compression.CompressionEnv`; so does `gymnasium.make_vec(..., vectorization_mode="sync")`, whose environments
share the problem and its record.
"""

from gymnasium.envs.registration import register

register("ajpq/Layer-v0", entry_point="envs.compression:CompressionEnv", kwargs={"controls": "layer"})
register("ajpq/Channel-v0", entry_point="envs.compression:CompressionEnv", kwargs={"controls": "channel"})
