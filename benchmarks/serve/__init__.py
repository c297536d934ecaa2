"""Parts of the load generator: workloads, clients, rivals, figures and the picture."""
