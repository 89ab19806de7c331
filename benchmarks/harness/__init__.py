"""What every benchmark command needs, whatever the device: cells, records, isolation, tables."""
