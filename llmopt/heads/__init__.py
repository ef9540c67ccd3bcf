"""Head scores: how much each query head matters."""
