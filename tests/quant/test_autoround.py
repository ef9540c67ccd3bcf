"""What the contract runs quant.autoround with; its tests stand beside those of quant.tune."""
CONTRACT = {"bits": 3, "group_size": 16, "iterations": 4, "lr": 0.05}
