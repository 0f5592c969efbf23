"""Gymnasium environments over an `ajpq.problem.Problem`; `gymnasium.make("envs:ajpq/Layer-v0", problem=...)`."""

from gymnasium.envs.registration import register

register("ajpq/Layer-v0", entry_point="envs.compression:CompressionEnv", kwargs={"controls": "layer"})
register("ajpq/Channel-v0", entry_point="envs.compression:CompressionEnv", kwargs={"controls": "channel"})
