"""What a steer does and costs: metrics, equal strength, judges. Knows no mechanism."""
