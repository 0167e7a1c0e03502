-- Take the run's lease, or learn who holds it.
-- KEYS[1] lease (hash: owner, token)   KEYS[2] fence (integer, only grows)
-- ARGV[1] owner   ARGV[2] lifetime in milliseconds
-- Returns {1, token} when taken, {0, owner that holds it} when not.
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then
  return {0, owner}
end
local token = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {1, tostring(token)}
