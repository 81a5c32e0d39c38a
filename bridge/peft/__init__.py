"""The configuration of PEFT adapters: ranks, scales, target modules."""
