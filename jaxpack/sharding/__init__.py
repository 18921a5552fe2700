"""One batch over many devices: shards that run the same plan with nearly equal real work."""

from jaxpack._namespace import publish as _publish
from jaxpack._plans.shards import deal, plan_shards
from jaxpack.data._stacked import stack_shards
from jaxpack.sharding._hosts import HostLostError, check_hosts_agree, start_hosts, watch_hosts
from jaxpack.sharding._mapping import map_shards, sum_shards
from jaxpack.sharding._packing import in_caller_order, pack_shards
from jaxpack.sharding._placement import prefetch_to_mesh, put
from jaxpack.sharding._units import UnitShards

__all__ = [
    "HostLostError",
    "UnitShards",
    "check_hosts_agree",
    "deal",
    "in_caller_order",
    "map_shards",
    "pack_shards",
    "plan_shards",
    "prefetch_to_mesh",
    "put",
    "stack_shards",
    "start_hosts",
    "sum_shards",
    "watch_hosts",
]

_publish(__name__)
