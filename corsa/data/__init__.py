"""What is edited: the edit record, benchmarks, the schedule of rounds."""
