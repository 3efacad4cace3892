"""A Ray cluster of two machines with a CPU each, played by this one, until stdin is closed."""

import sys

from ray.cluster_utils import Cluster

args = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=args)
cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
