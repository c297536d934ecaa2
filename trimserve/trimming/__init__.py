"""Which visual features stay: a request's plan, its budget, the policies that choose, and merging of the rest."""
