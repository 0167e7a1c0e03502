-- Set the head to a new version and wake the followers, if the lease is ours and the version grows.
-- KEYS[1] lease   KEYS[2] head (hash)   KEYS[3] events (stream)
-- ARGV[1] fencing token   ARGV[2] version   ARGV[3] manifest digest   ARGV[4] weights digest   ARGV[5] store URL
-- Returns {1, version} when announced; {0, reason} when refused: 'lease', or the version that stands.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return {0, 'lease'}
end
local head = redis.call('HGET', KEYS[2], 'version')
if head and tonumber(head) >= tonumber(ARGV[2]) then
  return {0, head}
end
redis.call('HSET', KEYS[2], 'version', ARGV[2], 'manifest_digest', ARGV[3], 'weights_digest', ARGV[4], 'store', ARGV[5])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'version', ARGV[2])
return {1, ARGV[2]}
