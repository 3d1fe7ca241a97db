"""What a run tells while it runs and afterwards: records, logs, curves, generations, the ledger of the card."""
