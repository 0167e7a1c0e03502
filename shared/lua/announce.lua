-- Set the head to a new version and wake the followers, if the lease is ours and the version grows.
-- KEYS[1] lease   KEYS[2] head (hash)   KEYS[3] events (stream)
-- ARGV[1] fencing token   ARGV[2] version   ARGV[3] manifest digest   ARGV[4...] the head's fields, name and value in turn
-- Returns {1, version} when announced, now or by an earlier call whose answer was lost;
-- {0, reason} when refused: 'lease', or the version that stands.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return {0, 'lease'}
end
local head = redis.call('HMGET', KEYS[2], 'version', 'manifest_digest')
if head[1] == ARGV[2] and head[2] == ARGV[3] then
  return {1, ARGV[2]}
end
if head[1] and tonumber(head[1]) >= tonumber(ARGV[2]) then
  return {0, head[1]}
end
-- Deleted first: no field of the head before may outlive it.
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], unpack(ARGV, 4))
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'version', ARGV[2])
return {1, ARGV[2]}
