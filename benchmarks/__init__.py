"""Speed against peers: every measurement in a fresh process, the arms taken in turns."""
